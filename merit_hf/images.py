"""Images in a dataset's rows: the column that holds them, in the one form that TRL takes, and what identifies them.

A row's images are the bytes of their files: the same file gives the same rows whether a row names its path or holds
it, and no decoder has a say.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.table import embed_table_storage

from merit_hf.config import ConfigError

# What TRL calls the column, and what it may be called without being named in CONFIG.
IMAGES = "images"
_NATURAL = (IMAGES, "image")
# Few: a row may hold megabytes.
_ROWS_AT_A_TIME = 16


def image_column(found: Sequence[str], given: str | None, takes_images: Callable[[], bool], where: str) -> str | None:
    """The column that holds the images: as CONFIG names it, else one of a natural name if the base reads images.

    Args:
        found: the dataset's columns.
        given: `images` of the dataset's entry.
        takes_images: whether the base reads images; asked only where it matters.
        where: names the entry in an error.

    Raises:
        ConfigError: there is no such column.
    """
    if given is None:
        natural = next((column for column in _NATURAL if column in found), None)
        return natural if natural is not None and takes_images() else None
    if given not in found:
        near = difflib.get_close_matches(given, found, n=1, cutoff=0.0)
        raise ConfigError(
            f"{where}.images={given!r}: no such column. Found: {', '.join(found)}. Did you mean `{near[0]}`?"
        )
    return given


def with_images(rows: datasets.Dataset, column: str, folder: Path | None, where: str) -> datasets.Dataset:
    """`rows` with the images of `column` in `images`: a list a row, empty where it has none, decoded when read.

    Args:
        column: one image or a list of them a row: paths, bytes, `{bytes, path}`, or the Image feature of `datasets`.
        folder: what paths are relative to; None where the rows come from the Hub, whose paths name nothing here.
        where: names the entry in an error.

    Raises:
        ConfigError: a path names no file, or a value is none of the above.
    """
    feature = rows.features[column]
    plain = not isinstance(_inner(feature), datasets.Image)
    if folder is None and not plain:
        _check_arrived(rows, column, where)
    if feature == datasets.List(datasets.Image()) and not rows.data.column(column).null_count:
        return rows.rename_column(column, IMAGES) if column != IMAGES else rows
    if not plain:
        rows = rows.cast_column(column, _like(feature, datasets.Image(decode=False)))

    def listed(value: Any, number: int) -> dict[str, Any]:
        values = [] if value is None else value if isinstance(value, list) else [value]
        place = f"{where}.images={column!r}, row {number}"
        return {IMAGES: [_image(item, folder if plain else Path(), place) for item in values]}

    features = {name: kept for name, kept in rows.features.items() if name != column}
    features[IMAGES] = datasets.List(datasets.Image())
    # Cached rows would not tell that a file has gone since.
    return rows.map(
        listed, input_columns=[column], with_indices=True, remove_columns=[column], desc=None,
        features=datasets.Features(features), load_from_cache_file=False,
    )  # fmt: skip


def undecoded(rows: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """The rows one by one, with images as `{bytes, path}`: without the cost of decoding them."""
    if IMAGES not in rows.column_names:
        yield from rows
        return
    for table in rows.with_format("arrow").iter(batch_size=_ROWS_AT_A_TIME):
        yield from table.to_pylist()


def embedded(rows: datasets.Dataset) -> datasets.Dataset:
    """`rows` that hold their images, whose files may be left behind; they name them without a folder."""
    if IMAGES not in rows.column_names:
        return rows
    return rows.with_format("arrow").map(embed_table_storage, batched=True, batch_size=_ROWS_AT_A_TIME, desc=None)


def image_digests(images: Sequence[dict[str, Any]]) -> list[str]:
    """sha256 of the file of each image of a row of [`undecoded`].

    Raises:
        ConfigError: a file has gone since it was named.
    """
    digests = []
    for image in images:
        content = image["bytes"]
        if content is None:
            try:
                if not Path(image["path"]).is_file():
                    raise FileNotFoundError("no such file")
                content = Path(image["path"]).read_bytes()
            except OSError as error:
                raise ConfigError(f"image {image['path']}: cannot be read: {error}. Restore it.") from error
        digests.append(hashlib.sha256(content).hexdigest())
    return digests


def _check_arrived(rows: datasets.Dataset, column: str, where: str) -> None:
    """Raises ConfigError where rows from the Hub name an image that did not come with them: a file of this machine."""
    downloads = os.getenv("HF_HUB_CACHE", os.path.join(datasets.config.HF_CACHE_HOME, "hub"))
    caches = [Path(path).resolve() for path in (datasets.config.HF_DATASETS_CACHE, downloads)]
    number = 0
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS_AT_A_TIME):
        for value in table.column(column).to_pylist():
            for image in [] if value is None else value if isinstance(value, list) else [value]:
                if image is not None and image["bytes"] is None:
                    file = Path(image["path"] or "").resolve()
                    if not any(file.is_relative_to(cache) for cache in caches):
                        raise ConfigError(
                            f"{where}.images={column!r}, row {number}: names {image['path']!r}, which did not come "
                            "with the dataset. Give one that holds its images."
                        )
            number += 1


def _inner(feature: Any) -> Any:
    return feature.feature if isinstance(feature, datasets.List) else feature


def _like(feature: Any, inner: Any) -> Any:
    return datasets.List(inner) if isinstance(feature, datasets.List) else inner


def _image(value: Any, folder: Path | None, place: str) -> dict[str, Any]:
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return {"bytes": value["bytes"], "path": None}
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise ConfigError(f"{place}: expected a path, bytes or an image, found a {type(value).__name__}.")
    if folder is None:
        raise ConfigError(
            f"{place}: names {path!r}, and paths in a Hub dataset lead nowhere here. Give a dataset that holds its "
            "images (an Image column)."
        )
    file = (folder / path).expanduser().absolute()
    if not file.is_file():
        raise ConfigError(f"{place}: no such file: {path!r} (looked for {file}). Paths are relative to the data file.")
    return {"bytes": None, "path": str(file)}
