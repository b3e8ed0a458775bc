"""What takes long to import is imported by what needs it alone."""

import json
import subprocess
import sys

import pytest

from tests.support.environment import ROOT

_MEGATRON = ["megatron.core", "megatron.training"]
_DRAWING_AND_TABLES = ["matplotlib", "pyarrow", "pandas", "scipy", "datasets"]

# Modules as a command loads them before it has read its arguments, and what must not be among what they load.
NOT_IMPORTED = {
    "rsa_megatron": ["torch", "numpy", "transformers", "megatron"],
    "rsa_megatron.alignment.loss": ["megatron", "transformers", "PIL", "triton"],
    "rsa_megatron.models.architectures": ["torch", "numpy", "transformers", "megatron"],
    "rsa_megatron.data.prepare.sample_checks": ["transformers", "megatron"],
    "checkpoint_conversion.__main__": [
        "transformers",
        "megatron",
        "transformer_engine",
        "apex",
        "PIL",
        *_DRAWING_AND_TABLES,
    ],
    "rsa_megatron.cli.measure": ["transformers", "torchvision", *_MEGATRON, *_DRAWING_AND_TABLES],
    "rsa_megatron.cli.data": ["transformers", "torchvision", *_MEGATRON, *_DRAWING_AND_TABLES],
    # Megatron loads torch's compiler, TensorBoard and wandb as it likes. Its tokenizer is transformers', without its models.
    "pretrain_llava_rsa": [
        "transformers.modeling_utils",
        "torchvision",
        "rsa_megatron.data.synthetic",
        "checkpoint_conversion",
        *_DRAWING_AND_TABLES,
    ],
}


def loaded(module: str, names: list[str]) -> list[str]:
    """Which of the names a new process has loaded once it has imported the module."""
    code = f"import json, sys, {module}; print(json.dumps([name for name in {names} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", NOT_IMPORTED)
def test_what_is_not_needed_is_not_imported(module):
    assert loaded(module, NOT_IMPORTED[module]) == []


def test_an_import_would_be_seen():
    """One of the names is loaded by the module that is about it: the test above can fail."""
    assert loaded("rsa_megatron.alignment.loss", NOT_IMPORTED["rsa_megatron"]) == ["torch", "numpy"]
    assert loaded("rsa_megatron.data.synthetic.tokenizer", NOT_IMPORTED["rsa_megatron.cli.data"])[0] == "transformers"


def test_names_of_the_package_come_when_they_are_asked_for():
    code = (
        "import sys, rsa_megatron as rsa; rsa.RSAConfig; print('torch' in sys.modules); "
        "rsa.rsa_loss; print('torch' in sys.modules, 'megatron' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == ["False", "True", "False"]
    with pytest.raises(AttributeError, match="has no attribute 'rsa_los'"):
        import rsa_megatron

        rsa_megatron.rsa_los


def test_the_training_script_leaves_the_collector_on():
    """It is off while modules are imported."""
    code = "import gc, rsa_megatron.training; print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == ["True", "True"]
