"""Where the rows of a data set are: an entry of `dataset_info.json`, a file or folder, or the Hub."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefkit.data.formats import COLUMNS, RowFormat, Use
from prefkit.data.messages import TAGS, RowError
from prefkit.data.readers import DataError, digest, file_type, is_readable, read_rows
from prefkit.data.recognise import recognise

_ENTRY_KEYS = (
    *("file_name", "hf_hub_url", "subset", "split", "folder"),
    *("formatting", "ranking", "num_samples", "columns", "tags"),
)
_REFUSED = {
    "ms_hub_url": "data sets come from files or the Hugging Face Hub: download it and write file_name",
    "om_hub_url": "data sets come from files or the Hugging Face Hub: download it and write file_name",
    "script_url": "no code that comes with data is run: write file_name or hf_hub_url",
    "cloud_file_name": "it is not downloaded: download it and write file_name",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
INFO_FILE = "dataset_info.json"
_STAGES = {"pairs": "dpo and rm", "judged": "kto", "prompts": "ppo"}


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hugging Face Hub; `streams` reads it while it is downloaded."""

    url: str
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    streams: bool = False


@dataclass(frozen=True)
class DatasetEntry:
    """One data set: where its rows are, and how they are read; without a `layout` that is recognised.

    `num_samples` rows are drawn at random; all are read where it is None.
    """

    name: str
    files: tuple[Path, ...] = ()
    hub: HubSet | None = None
    layout: RowFormat | None = None
    ranking: bool | None = None
    num_samples: int | None = None

    @property
    def label(self) -> str:
        """The name of the data set where a path would not do: in metrics and names of files."""
        return Path(self.name).name.partition(".")[0]

    @property
    def places(self) -> tuple[str, ...]:
        """Its files, or its id on the Hub: what the sources of its rows begin with."""
        return (self.hub.url,) if self.hub else tuple(map(str, self.files))

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Each row as (`file:row`, row); a row that cannot be read comes as a `RowError`."""
        if self.hub is not None:
            for number, row in enumerate(_load_hub(self.hub), 1):
                yield f"{self.hub.url}:{number}", row
        for file in self.files:
            for number, row in read_rows(file):
                yield f"{file}:{number}", row

    def digest(self) -> str:
        """A hash of the content of all files, or of the rows."""
        if self.hub is None and len(self.files) == 1:
            return digest(self.files[0])
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(bytes.fromhex(digest(file)))
        if self.hub is not None:
            for _, row in self.rows():
                whole.update(json.dumps(row, sort_keys=True, default=repr).encode())
        return whole.hexdigest()

    def recognised(self) -> DatasetEntry:
        """The same with the layout of its rows. Raises `DataError` when it has none that is known."""
        if self.layout is not None:
            return self
        problem = ""
        for source, row in self.rows():
            if not isinstance(row, RowError):
                return replace(self, layout=recognise(row, self.name))
            problem = problem or f" that can be read; {source}: {row}"
        raise DataError(f"data set {self.name!r} has no rows{problem}")


def find_datasets(
    dataset_dir: str, names: Sequence[str], use: Use, cache_dir: str | None
) -> list[DatasetEntry]:
    """The data sets that are asked for, by their name in `dataset_dir/dataset_info.json` or by their path.

    Raises `DataError` for a missing or broken `dataset_info.json`, a name that is neither listed there nor
    a file, an entry of another stage, a key that is not known, or a file that is not there: all at once.
    """
    if dataset_dir == "ONLINE":
        return [_checked_hub(name, {"hf_hub_url": name}) for name in names]
    folder = Path(dataset_dir)
    info_file = folder / INFO_FILE
    if dataset_dir.startswith("REMOTE:"):
        info_file = _download_info(dataset_dir.removeprefix("REMOTE:"), cache_dir)
    elif not info_file.is_file():
        absent = [name for name in names if not _find_path(name, folder)]
        if absent:
            near = _near_file(absent[0])
            raise DataError(
                f"{', '.join(absent)}: there is no such file{near}, and {info_file}, which would list it, is "
                "missing. Write the path of a file, or set dataset_dir to the folder of dataset_info.json."
            )
        return [_direct_entry(name, folder) for name in names]
    info = _read_info(info_file)
    entries, problems = [], []
    for name in names:
        try:
            if name in info:
                entries.append(_make_entry(folder, name, info[name], use))
            elif _find_path(name, folder):
                entries.append(_direct_entry(name, folder))
            else:
                problems.append(
                    f"{info_file} has no data set {name!r}{_hint(name, info)}, and no file is named so"
                )
        except DataError as error:
            problems.append(f"{info_file}, {name!r}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return entries


def _read_info(info_file: Path) -> dict[str, Any]:
    try:
        info = json.loads(info_file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{info_file} is not valid JSON: {error}") from None
    if not isinstance(info, dict):
        raise DataError(f"{info_file} must hold an object: data set name -> how to read it")
    return info


def _find_path(name: str, folder: Path) -> Path | None:
    """The file or folder that a name which is listed nowhere means, here or in `dataset_dir`."""
    if "\0" in name:
        return None
    for path in (Path(name).expanduser(), folder / name):
        if path.is_file() or path.is_dir():
            return path
    return None


def _near_file(name: str) -> str:
    near = difflib.get_close_matches(Path(name).name, _names_in(Path(name).parent), n=1)
    return f" (there is {Path(name).with_name(near[0])})" if near else ""


def _direct_entry(name: str, folder: Path) -> DatasetEntry:
    path = _find_path(name, folder)
    assert path is not None
    return DatasetEntry(name, _list_files(path))


def _list_files(path: Path) -> tuple[Path, ...]:
    """A file, or those of a folder, which are of one type. Raises `DataError` for anything else."""
    if path.is_file():
        if not is_readable(path):
            raise DataError(
                f"file {path} is none of json, jsonl, csv, parquet, arrow and txt, or one with .gz"
            )
        return (path,)
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in files if file.name != INFO_FILE and file.suffix.lower() != ".md"]
    types = sorted({file_type(file) for file in files})
    if len(types) > 1:
        raise DataError(f"folder {path} has files of several types ({', '.join(types)}): keep one type in it")
    if not files or not is_readable(files[0]):
        raise DataError(f"folder {path} has no files of type json, jsonl, csv, parquet, arrow or txt")
    return tuple(files)


def _make_entry(folder: Path, name: str, entry: Any, use: Use) -> DatasetEntry:
    if not isinstance(entry, dict):
        raise DataError("an entry is an object")
    for key in entry:
        if key in _REFUSED:
            raise DataError(f"`{key}`: {_REFUSED[key]}")
        if key not in _ENTRY_KEYS:
            raise DataError(f"unknown or unsupported key {key!r}{_hint(key, _ENTRY_KEYS)}")
    layout = _make_layout(entry)
    ranking = entry.get("ranking", False)
    if not isinstance(ranking, bool):
        raise DataError(f"`ranking` is true or false, not {ranking!r}")
    if use == "pairs" and not ranking:
        raise DataError(
            "not a preference set: stages dpo and rm need `ranking: true` with chosen and rejected"
        )
    if use == "judged" and ranking:
        raise DataError("a preference set (`ranking: true`): stage kto reads single responses with a kto_tag")
    number = entry.get("num_samples")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise DataError(f"`num_samples` is a whole number above 0, not {number!r}")
    if entry.get("hf_hub_url"):
        found = _checked_hub(name, entry)
    else:
        found = DatasetEntry(name, _entry_files(folder, entry))
    return replace(found, layout=layout, ranking=ranking, num_samples=number)


def _make_layout(entry: Mapping[str, Any]) -> RowFormat:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in COLUMNS:
        raise DataError(f"`formatting` is one of {', '.join(COLUMNS)}, not {formatting!r}{_hint(formatting)}")
    columns = _named(entry, "columns", COLUMNS[formatting])
    tags = _named(entry, "tags", TAGS["sharegpt"])
    return RowFormat(formatting, columns, tags)


def _entry_files(folder: Path, entry: Mapping[str, Any]) -> tuple[Path, ...]:
    if not isinstance(entry.get("file_name"), str):
        raise DataError("`file_name` is missing: a file or folder, relative to dataset_dir")
    name = entry["file_name"]
    if "\0" in name:
        raise DataError("`file_name` is no name of a file")
    path = folder / name
    files = _list_files(path) if path.is_dir() else (path,)
    for file in (path, *files):
        if not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"`file_name` {name!r} leads out of {folder}: {file}")
    if not path.exists():
        raise DataError(f"file {path} does not exist{_hint(Path(name).name, _names_in(path.parent))}")
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{path} is no ordinary file")
    return _list_files(path)


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _named(entry: Mapping[str, Any], key: str, known: Mapping[str, str]) -> dict[str, str]:
    """The `columns` or `tags` object of an entry, its keys checked."""
    given = entry.get(key, {})
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise DataError(f"`{key}` is an object that maps names to texts")
    for name in given:
        if name not in known:
            by_usual_name = next((ours for ours, usual in known.items() if usual == name), None)
            hint = f"; write {by_usual_name!r} for it" if by_usual_name else _hint(name, known)
            raise DataError(f"`{key}` has no {name!r}{hint}")
    return given


def _hint(name: object, known: Sequence[str] | Mapping[str, Any] = tuple(COLUMNS)) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    listed = list(known)
    shown = ", ".join(listed[:20]) + (", ..." if len(listed) > 20 else "")
    return f"{meant} (it has: {shown or 'nothing'})"


def _checked_hub(name: str, entry: Mapping[str, Any]) -> DatasetEntry:
    texts = {key: entry.get(key) for key in ("hf_hub_url", "subset", "split", "folder")}
    for key, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"`{key}` is a text, not {value!r}")
    url = texts["hf_hub_url"] or ""
    if not _HUB_ID.fullmatch(url):
        raise DataError(f"`hf_hub_url` is an id such as owner/name, not {url!r}")
    return DatasetEntry(name, hub=HubSet(url, texts["subset"], texts["split"] or "train", texts["folder"]))


def _load_hub(hub: HubSet) -> Any:
    """The rows of a data set on the Hub, through the library `datasets`; no code of the data set is run."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            hub.url, hub.subset, data_dir=hub.folder, split=hub.split, streaming=hub.streams
        )
        return _with_encoded_images(rows)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"hf_hub_url {hub.url!r} cannot be read: {error}") from error


def _with_encoded_images(rows: Any) -> Any:
    """The rows with images as the bytes they are stored as: what is decoded, and how, is decided here."""
    features = copy.deepcopy(rows.features)
    return rows.cast(features) if features and _stop_decoding(features) else rows


def _stop_decoding(feature: Any) -> bool:
    """Whether a feature of the library `datasets` has images, which then are not decoded any more."""
    if isinstance(feature, Mapping | list):
        inside = feature.values() if isinstance(feature, Mapping) else feature
        return sum(map(_stop_decoding, inside)) > 0
    if type(feature).__name__ == "Image":
        feature.decode = False
        return True
    inner = getattr(feature, "feature", None)
    return inner is not None and _stop_decoding(inner)


def _download_info(repository: str, cache_dir: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        file = huggingface_hub.hf_hub_download(
            repository, INFO_FILE, repo_type="dataset", cache_dir=cache_dir
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise DataError(f"dataset_dir: {INFO_FILE} of {repository} cannot be read: {error}") from error
    return Path(file)
