"""`python -m model push`: puts an export folder with its model card on the Hugging Face hub.

    HF_TOKEN=...  python -m model push --input runs/demo/export --repo user/priorclip --license mit

    create the repository, private -> complete the card -> one commit with all files

The token comes from the environment (HF_TOKEN) or from `hf auth login`, and is never printed. Only files of an export
are uploaded, whatever else lies in the folder. A repository that everybody can read needs ``--public``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml

from priorclip.common.hub import ID, hide_bars_in_logs
from priorclip.common.safe_tokenizer import open_tokenizer
from priorclip.model.commands import ExportConfig, PushConfig
from priorclip.model.config import SceneConfig
from priorclip.model.export.folder import from_pretrained
from priorclip.model.export.formats import write_format
from priorclip.model.export.to_open_clip import TOKENIZER_FILES
from priorclip.model.export_config import CODE, read_export_config

SUFFIXES = (".json", ".txt", ".model", ".safetensors")
EXAMPLE = "example"  # name of the picture of the widget
LOAD = """\
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo}"{trust})
processor = AutoProcessor.from_pretrained("{repo}")"""
USE = """\
Search of images taken from above by words, the reverse, and zero-shot classification of scenes. It is not tested on
other images, and it is not meant for decisions about people."""


def push(config: PushConfig) -> str:
    """Uploads the folder and returns the address of the repository.

    Raises:
        OSError: the hub refuses; the message has its reason
        ValueError: bad options, no token, a damaged export, or a public repository without ``public``
    """
    found = ID.fullmatch(config.repo)
    if not found or found["revision"]:
        raise ValueError(f"--repo {config.repo} must be user/name or organisation/name")
    source = Path(config.input)
    if not (source / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"--input {source} is no export folder: `python -m model export --input RUN` writes one"
        )
    check_whole(source)
    if config.example is not None and not Path(config.example).is_file():
        raise FileNotFoundError(f"--example {config.example} is no file")
    with tempfile.TemporaryDirectory() as temporary:
        folder = source
        if config.format == "transformers":
            folder = Path(temporary) / "model"
            write_format(source, ExportConfig(str(source), str(folder), "transformers"))
        return upload(config, folder, complete_card(config, source, folder))


def check_whole(source: Path) -> None:
    """Raises OSError or ValueError, which name the file, for an export that nobody could load."""
    from_pretrained(source)
    if any((source / name).is_file() for name in TOKENIZER_FILES):
        open_tokenizer(str(source))


def upload(config: PushConfig, folder: Path, card: str) -> str:
    """Creates the repository if there is none, and commits the files."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    token = get_token()
    if token is None:
        raise ValueError(
            "the hub does not know you: set HF_TOKEN to one of your tokens that may write, which are at "
            "https://huggingface.co/settings/tokens"
        )
    hide_bars_in_logs()
    files: dict[str, str | bytes] = {path.name: str(path) for path in files_of(folder)}
    files["README.md"] = card.encode()
    if config.example is not None:
        files[example_name(config.example)] = config.example
    api = HfApi(token=token)
    try:
        url = api.create_repo(config.repo, private=not config.public, exist_ok=True)
        if not api.model_info(config.repo).private and not config.public:
            raise ValueError(f"--repo {config.repo} is public, so everybody could read the model: give --public")
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        api.create_commit(config.repo, operations, commit_message=config.message)
    except HfHubHTTPError as error:
        raise OSError(f"the hub does not take {config.repo}: {error}") from error
    return str(url)


def files_of(folder: Path) -> list[Path]:
    """Returns the files of an export in the folder: no hidden ones, no links, no code but the export's own."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
        and (path.suffix in SUFFIXES or path.name == f"{CODE}.py")
    ]  # fmt: skip


def example_name(place: str) -> str:
    return EXAMPLE + Path(place).suffix.lower()


def complete_card(config: PushConfig, source: Path, folder: Path) -> str:
    """Returns the card of the export with what the hub reads: licence, task, widget, data and intended use."""
    card = source / "README.md"
    facts, text = split_card(card.read_text(encoding="utf-8", errors="replace") if card.is_file() else "# PriorCLIP\n")
    is_classifier = isinstance(read_export_config(source), SceneConfig)
    if not is_classifier:
        facts["pipeline_tag"] = "zero-shot-image-classification"
    if config.license:
        facts["license"] = config.license
    if config.example is not None:
        place = f"https://huggingface.co/{config.repo}/resolve/main/{example_name(config.example)}"
        facts["widget"] = [{"src": place, "candidate_labels": config.labels, "example_title": "example"}]
    parts = [text.replace("FOLDER", f'"{config.repo}"').rstrip()]
    if config.format == "transformers":
        facts["library_name"] = "transformers"
        trust = ", trust_remote_code=True" if (folder / f"{CODE}.py").is_file() else ""
        parts.append(f"## In transformers alone\n\n```python\n{LOAD.format(repo=config.repo, trust=trust)}\n```")
    parts.append(f"## Training data\n\n{config.training_data or 'Not stated.'}")
    parts.append(f"## Intended use\n\n{USE}")
    head = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return "\n".join(["---", head.rstrip(), "---", "\n\n".join(parts), ""])


def split_card(card: str) -> tuple[dict[str, object], str]:
    """Returns the facts at the top of a card, and the text below them. Facts that are no mapping are dropped."""
    lines = card.split("\n")
    if lines[0] != "---" or "---" not in lines[1:]:
        return {}, card
    end = lines.index("---", 1)
    try:
        facts = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError:
        facts = None
    return (facts if isinstance(facts, dict) else {}), "\n".join(lines[end + 1 :])
