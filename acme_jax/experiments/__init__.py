"""The paper's experiments: one file each, run by `scripts/reproduce.py`.

`settings` says how each data set is used, `study` makes what the experiments of one seed share
(data, supernet, headers), `final` is the only module that reads test data, `experiment` is the
record that every experiment fills, `running` runs, resumes and writes them, `statistics` gives
means and paired differences with intervals.
"""
