"""Where rows come from: files, folders, globs, URLs and data sets of the hub, resolved by `datasets`.

A source is a list of files (or one data set of the hub) in a fixed order, and an identity that follows from their
content. Its rows come in chunks, each row with its place: "file:line", or "file: row N" where lines mean nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from hymba_align import hub
from hymba_align.data.reading.file_listing import download_config, is_mentioned, list_files
from hymba_align.data.reading.raw_rows import RawRow, parse_row
from hymba_align.data.reading.readers import KINDS, DataFile, Kind, dataset_rows, readable, reason_of
from hymba_align.errors import DataError, DataFileError
from hymba_align.recipe import COMPRESSION_SUFFIXES, SourceSection, is_local_path
from hymba_align.secrets import shown

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_ROWS",
    "RawRow",
    "Source",
    "files_passed_over",
    "open_source",
    "parse_row",
    "read_cached_or_hub",
    "read_hub",
    "source_digest",
]

CHUNK_ROWS = 480  # of many divisors, so that joined questions fill conversations evenly
CHUNK_BYTES = 4_000_000
ACCEPTED = ", ".join(KINDS)
# What file systems call the digest of a file's content; what has none is read through to make one.
CONTENT_TAGS = ("ETag", "etag", "Content-MD5", "content_md5", "md5Hash", "md5", "crc32c", "blob_id", "sha256")
NAME_A_FILE = "name a file that exists here, or a data set of the hub"
REFUSED_PROTOCOLS = frozenset(
    {
        "simplecache",
        "filecache",
        "blockcache",
        "cached",
        "reference",
        "generic",
        "asyncwrapper",
        "dask",
        "jupyter",
        "jlab",
    }
)
REFUSED_OPTIONS = frozenset(
    {"cache_storage", "target_protocol", "remote_protocol", "fo", "fs", "filesystem", "auto_mkdir"}
)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """Rows to read; `files` are named as the user named them.

    `passed_over` names what a folder, glob or archive holds besides and what is not read, as seen from the folder:
    other kinds of files, hidden ones that look like data. README, LICENSE and what programs keep there are left out.
    """

    name: str
    files: tuple[str, ...]
    max_rows: int | None = None
    contents: tuple[DataFile, ...] = field(default=(), repr=False)
    passed_over: tuple[str, ...] = ()
    dataset: Any = field(default=None, repr=False)  # of the hub
    version: str | None = field(default=None, repr=False)  # what it is known by

    @cached_property
    def identity(self) -> str:
        """Changes with the content of the rows. It takes a reading of all files, so a stream does not ask for it.

        Raises: DataError for a file that cannot be read.
        """
        if self.version is not None:
            return self.version
        with readable(self.name):
            return _digest(*(part for file in self.contents for part in (file.name, _content_tag(file))))

    def rows(self) -> Iterator[RawRow]:
        """The rows in order, lazily, no more than `max_rows`. Raises: DataError, as `chunks`."""
        read = dataset_rows(self.name, self.dataset) if self.dataset is not None else self._file_rows()
        empty = True
        for row in islice(read, self.max_rows):
            empty = False
            yield row
        if empty:
            raise DataFileError(f"{self.name}: holds no rows; it needs at least one")

    def _file_rows(self) -> Iterator[RawRow]:
        for file in self.contents:
            yield from file.rows()

    def chunks(self) -> Iterator[list[RawRow]]:
        """The rows in order, in chunks that depend on the content alone: CHUNK_ROWS rows, or about CHUNK_BYTES.

        Raises: DataError for a file that cannot be read on, and for a source without rows.
        """
        chunk: list[RawRow] = []
        size = 0
        rows = self.rows()
        while True:
            try:
                row = next(rows, None)
            except DataError:
                if chunk:
                    yield chunk  # what was read before counts
                raise
            if row is not None:
                size += len(row.value) if isinstance(row.value, bytes) else _size(row.value)
                chunk.append(row)
            if chunk and (row is None or len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES):
                yield chunk
                chunk, size = [], 0
            if row is None:
                return


def _size(value: Any) -> int:
    """About the bytes of a row's texts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_size(each) for each in value.values())
    return sum(_size(each) for each in value) if isinstance(value, (list, tuple)) else 8


def open_source(section: SourceSection) -> Source:
    """The section's files, or its data set of the hub, ready to be read.

    Raises: DataError when nothing is there, or nothing that can be read.
    """
    if _is_of_the_hub(section.path):
        return _open_hub(section)
    _check_keys(section)
    _forget_archives()
    _check_protocols(section)
    with readable(shown(section.path)):
        found = _resolve(section)
    names = tuple(file.name for file in found.files)
    return Source(shown(section.path), names, section.max_rows, tuple(found.files), tuple(found.passed_over))


def files_passed_over(section: SourceSection) -> tuple[str, ...]:
    """What `open_source` passes over; nothing of a data set of the hub, which is not asked. Raises: DataError."""
    return () if _is_of_the_hub(section.path) else open_source(section).passed_over


def source_digest(section: SourceSection) -> str:
    """The identity that `open_source` gives; of a data set that the hub does not give out now, that of its name.

    Raises: DataError for files that are missing.
    """
    commit = _commit(section)[0] if _is_of_the_hub(section.path) else None
    if commit is not None:
        return _hub_identity(section, commit)
    try:
        return open_source(section).identity
    except DataError:
        if _is_of_the_hub(section.path):
            return _hub_identity(section, None)
        raise


def _digest(*parts: str | None) -> str:
    return hashlib.sha256("\0".join(repr(part) for part in parts).encode("utf-8", "surrogatepass")).hexdigest()


def _is_of_the_hub(path: str) -> bool:
    if "://" in path or path.lower().endswith((*KINDS, *COMPRESSION_SUFFIXES)):
        return False
    return not is_local_path(path)


def _check_keys(section: SourceSection) -> None:
    for key in ("subset", "revision", "split"):
        if getattr(section, key) != SourceSection.model_fields[key].default:
            raise DataFileError(
                f"{shown(section.path)}: {key} is '{getattr(section, key)}', but only data sets of the hub have one; remove it"
            )


def _check_protocols(section: SourceSection) -> None:
    """Refuses file systems that write what they read to a folder of the recipe's choice, or read other files than named."""
    schemes = [hop.partition("://")[0] for hop in section.path.split("::")]
    for scheme in schemes:
        if scheme in REFUSED_PROTOCOLS:
            raise DataFileError(
                f"{shown(section.path)}: the file system '{scheme}' keeps copies or follows other files; name the data's own URL"
            )
    for key in _all_keys(section.storage_options):
        if key in REFUSED_OPTIONS or key in REFUSED_PROTOCOLS:
            raise DataFileError(
                f"{shown(section.path)}: storage_options has {key}, by which files are written or others read; remove it"
            )


def _all_keys(options: Any) -> Iterator[str]:
    if isinstance(options, Mapping):
        for key, value in options.items():
            yield str(key)
            yield from _all_keys(value)
    elif isinstance(options, (list, tuple)):
        for value in options:
            yield from _all_keys(value)


# ---- files ----------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """Files to read, and the names of those that are not."""

    files: list[DataFile]
    passed_over: list[str]


def _resolve(section: SourceSection) -> _Found:
    """The files that the section's path means, sorted. Raises: DataError, FileNotFoundError."""
    path, options = shown(section.path), section.storage_options
    url = section.path.removeprefix("file://")
    url = os.path.expanduser(url) if "://" not in url else url
    if _is_file(url, options):
        found = _members(path, os.path.abspath(url) if "://" not in url else url, options)
        if not found.files:
            raise DataFileError(f"{path}: files of this kind are not read; use one of {ACCEPTED}, also compressed")
        return found
    listing = list_files(url, options)
    if listing is None:
        raise DataFileError(f"{path}: no such file; name one that exists, or a hub data set such as openai/gsm8k")
    files: list[DataFile] = []
    passed_over = [listing.below(other) for other in listing.others]
    for match in listing.matched:
        found = _members(_name(url, match), match, options)
        files += found.files
        passed_over += [f"{listing.below(match)}/{member}" for member in found.passed_over]
        passed_over += [] if found.files else [listing.below(match)]
    if not files:
        count = len(listing.matched) + len(listing.others)
        if not count:
            raise DataFileError(f"{path}: the folder is empty; put data files into it, or name another")
        raise DataFileError(f"{path}: holds no data files among its {count}; they end in {ACCEPTED}, also compressed")
    return _Found(files, sorted(filter(is_mentioned, passed_over)))


def _is_file(url: str, options: Mapping[str, Any]) -> bool:
    if "://" not in url:
        return os.path.isfile(url)
    if url.startswith(("http://", "https://")):
        return True  # the web has no folders
    from datasets.utils.file_utils import xisfile

    return bool(xisfile(url, download_config=download_config(options)))


def _members(name: str, url: str, options: Mapping[str, Any]) -> _Found:
    """The data file at `url`, or those in it when it is a zip archive; none when it is of another kind."""
    from datasets import StreamingDownloadManager

    bare = _without_query(url)
    kind = _kind_of(bare)
    if not bare.lower().endswith(COMPRESSION_SUFFIXES):
        return _Found([DataFile(name, url, kind, options)] if kind else [], [])
    is_archive = bare.lower().endswith(".zip")
    if kind is None and not is_archive:
        return _Found([], [])
    manager = StreamingDownloadManager(download_config=download_config(options))
    with readable(name):
        inner = sorted(manager.iter_files(manager.extract(url)))
    if not is_archive:
        return _Found([DataFile(name, each, kind, options) for each in inner if kind], [])
    inside = [(each, each.split("::")[0].removeprefix("zip://")) for each in inner]
    known = [(each, member, None if _is_hidden(member) else _kind_of(member)) for each, member in inside]
    if len(inner) == 1 and known[0][2] is None and not _is_hidden(known[0][1]):
        known = [(known[0][0], known[0][1], kind)]  # d.jsonl.zip says what its only member is
    files = [(each, member, of) for each, member, of in known if of is not None]
    return _Found(
        [DataFile(name if len(files) == 1 else f"{name}/{member}", each, of, options) for each, member, of in files],
        [member for _, member, of in known if of is None and files and is_mentioned(member)],
    )


def _kind_of(path: str) -> Kind | None:
    """What a file of this name holds, beneath its compression; None for other kinds."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _is_hidden(member: str) -> bool:
    return any(part.startswith((".", "__")) for part in PurePosixPath(member).parts)


def _without_query(url: str) -> str:
    return re.split(r"[?#]", url)[0] if url.startswith(("http://", "https://")) else url


def _name(given: str, match: str) -> str:
    """A match as the user would write it: relative where the glob or folder is."""
    return os.path.relpath(match) if "://" not in given and not os.path.isabs(given) else shown(match)


def _forget_archives() -> None:
    """fsspec keeps archives open by their path, and would go on reading one that was replaced."""
    from fsspec import get_filesystem_class

    get_filesystem_class("zip").clear_instance_cache()


def _content_tag(file: DataFile) -> str:
    """What changes when the file's content does: its digest here, its tag where a remote file system gives one."""
    from datasets.utils.file_utils import _prepare_path_and_storage_options, xopen
    from fsspec.core import url_to_fs

    *_, outer = file.url.split("::")  # a compressed file, not what is in it
    if "://" in outer:
        prepared, storage_options = _prepare_path_and_storage_options(outer, download_config(file.storage_options))
        filesystem, path = url_to_fs(prepared, **storage_options)
        filesystem.invalidate_cache()
        information = filesystem.info(path)
        tags = [f"{tag}={information[tag]}" for tag in CONTENT_TAGS if information.get(tag)]
        if tags:
            return " ".join(tags)
    with readable(file.name), xopen(outer, "rb", download_config=download_config(file.storage_options)) as content:
        digest = hashlib.sha256()
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- the hub --------------------------------------------------------------------------------------------------------


def _open_hub(section: SourceSection) -> Source:
    _check_no_builder(section.path)
    commit, silent = _commit(section)
    options = {"name": section.subset, "split": section.split, "revision": commit or section.revision}
    given = {key: value for key, value in options.items() if value is not None}
    if silent:  # its client would ask for half a minute, as it does for a commit, about which nobody was asked
        return _from_cache(section, given)
    try:
        dataset = read_hub(section.path, NAME_A_FILE, streaming=True, **given)
    except DataError:
        if (
            commit is not None and commit != section.revision
        ):  # the hub answers, so it is what is asked for that is wrong
            raise
        dataset = read_hub(section.path, NAME_A_FILE, **given)  # what was downloaded before serves without a network
    identity = _hub_identity(section, commit or getattr(dataset, "_fingerprint", None))
    return Source(section.path, (section.path,), section.max_rows, dataset=dataset, version=identity)


def _from_cache(section: SourceSection, given: Mapping[str, Any]) -> Source:
    """A data set that was downloaded before. Raises: DataFileError."""
    try:
        with hub.cache_alone():
            dataset = read_hub(section.path, NAME_A_FILE, **given)
    except DataError as error:
        raise DataFileError(
            f"{section.path} is not in the cache, and the Hugging Face hub does not answer; {NAME_A_FILE}"
        ) from error
    identity = _hub_identity(section, getattr(dataset, "_fingerprint", None))
    return Source(section.path, (section.path,), section.max_rows, dataset=dataset, version=identity)


def _check_no_builder(path: str) -> None:
    """Refuses the names that `datasets` takes for its own readers (csv, pandas, sql, ...), which read what lies here."""
    import pkgutil

    from datasets import packaged_modules

    if path in {module.name for module in pkgutil.iter_modules(packaged_modules.__path__)}:
        raise DataFileError(f"{path} is a reader of the library datasets and no data set; {NAME_A_FILE} as owner/name")


def read_hub(repository: str, what_to_do: str, **options: Any) -> Any:
    """What `datasets.load_dataset` gives for a data set on the hub. Raises: DataError that ends in `what_to_do`."""
    import datasets

    try:
        return datasets.load_dataset(path=repository, **options)
    except Exception as error:  # the hub, its client and the readers raise many kinds, all about this data set
        raise DataFileError(
            f"{repository} cannot be read from the Hugging Face hub ({reason_of(error)}); {what_to_do}"
        ) from error


def read_cached_or_hub(repository: str, what_to_do: str, **options: Any) -> Any:
    """What `read_hub` gives, from the cache where it has it; else from the hub, asked once and shortly whether it answers.

    For data sets that do not change any more: a newer version on the hub is not looked for.
    Raises: DataFileError that ends in `what_to_do`.
    """
    with hub.cache_alone(), contextlib.suppress(DataError):
        return read_hub(repository, what_to_do, **options)
    problem = "HF_HUB_OFFLINE forbids to fetch it" if hub.is_forbidden() else hub.hub_problem(repository, "dataset")
    if problem is not None:
        raise DataFileError(f"{repository} is not in the cache, and {problem}; {what_to_do}")
    return read_hub(repository, what_to_do, **options)


def _hub_identity(section: SourceSection, version: str | None) -> str:
    return _digest("hub", section.path, section.subset, section.split, version or section.revision)


def _commit(section: SourceSection) -> tuple[str | None, bool]:
    """The commit that the section's revision means now, None where the hub cannot say; and whether nobody answers."""
    if section.revision and COMMIT.fullmatch(section.revision):
        return section.revision, False
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(section.path, revision=section.revision, timeout=10).sha, False
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return None, False
    except Exception as error:
        if not hub.is_network_error(error):
            raise
        return None, True
