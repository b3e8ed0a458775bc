"""Which kind of model a folder holds: a Megatron checkpoint and a Hugging Face folder are easily named in each other's place."""

from pathlib import Path

_TRACKER = "latest_checkpointed_iteration.txt"


def find_run(folder: Path) -> Path | None:
    """Return the folder of --save or hf-to-megatron that a path names, or that the one checkpoint it names lies in.

    None where it is no Megatron checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir() or is_hf_folder(folder):
        return None
    if (folder / _TRACKER).is_file() or any(folder.glob("iter_*/")):
        return folder
    is_one = (folder / ".metadata").is_file() or any(
        folder.glob("mp_rank_*/")
    )  # torch_dist, and Megatron's older format
    return folder.parent if is_one else None


def is_hf_folder(folder: Path) -> bool:
    return (Path(folder) / "config.json").is_file()


def explain_checkpoint(flag: str, folder: Path, *, measures: bool = False) -> str | None:
    """Explain that a flag for a Hugging Face folder names a Megatron checkpoint, with the remedy; None where it does not."""
    run = find_run(folder)
    if run is None:
        return None
    remedy = f"rsa-megatron convert megatron-to-hf --checkpoint {run} --out HF makes one of it"
    if measures:
        remedy = f"--checkpoint {run} measures it, or {remedy}"
    return f"{flag}{folder} is a Megatron checkpoint, not a Hugging Face folder; {remedy}"


def explain_hf_folder(flag: str, folder: Path, remedy: str) -> str | None:
    """Explain that a flag for a Megatron checkpoint names a Hugging Face folder, with the remedy; None where it does not."""
    folder = Path(folder)
    if not is_hf_folder(folder):
        return None
    if folder.name == "hf" and find_run(folder.parent):
        remedy = f"these are the files beside a checkpoint: name {folder.parent}"
    return f"{flag}{folder} is a Hugging Face folder, not a Megatron checkpoint; {remedy}"
