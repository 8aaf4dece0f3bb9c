"""LLaVA records as a TensorFlow Datasets folder of ArrayRecord files, images as their original bytes; no TensorFlow.

A shard is either complete or absent, so an interrupted build resumes where it stopped."""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

from deltallava_jax.data import cache
from deltallava_jax.data.check import examine
from deltallava_jax.data.llava_json import LlavaJson
from deltallava_jax.data.records import Mixture, Record, texts
from deltallava_jax.errors import BadSample, ConfigError, TooManyFaults, count_faults
from deltallava_jax.progress import progress_bar

SHARD = 2000  # records per shard
NAME = "llava-train.array_record-{:05d}-of-{:05d}"


def _features():
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(None, None, None))  # any encoding, kept unchanged
    text = tfds.features.Text
    return tfds.features.FeaturesDict({"id": text(), "conversations": text(), "images": tfds.features.Sequence(image)})


def build(source: LlavaJson | Mixture, folder: Path, workers: int) -> dict:
    """Writes the folder, without the records that ``check.examine`` finds broken.

    Returns {"records", "bytes", "faults": [(kind, message), ...]}. Raises ConfigError if the folder holds a build of
    other records, TooManyFaults if no record is usable."""
    shards = max(1, -(-len(source) // SHARD))
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / "source.json"
    expected = json.dumps({"fingerprint": source.fingerprint, "records": len(source)})
    if not description.exists():
        with cache.writing(description) as part:
            part.write_text(expected)
    elif description.read_text() != expected:
        raise ConfigError(
            f"{folder} was built from other records, or its source.json is damaged; use a new folder, or remove it"
        )
    missing = [number for number in range(shards) if not _report(folder, number, shards).exists()]
    tasks = [(source, folder, number, shards) for number in missing]
    with (
        progress_bar(what="building", total=len(source), unit="records", keep=True) as bar,
        multiprocessing.get_context("spawn").Pool(max(1, workers)) as pool,
    ):
        bar.update(sum(_range(source, number, shards)[2] for number in range(shards) if number not in missing))
        for written in pool.imap_unordered(_write_shard, tasks):
            bar.update(written)
    reports = [json.loads(_report(folder, number, shards).read_text()) for number in range(shards)]
    faults = [tuple(fault) for report in reports for fault in report["faults"]]
    if not any(report["records"] for report in reports):
        counts = count_faults(kind for kind, _ in faults)
        raise TooManyFaults(f"none of the {len(source):,} records is usable: {counts}")
    _write_metadata(folder, reports)
    return {
        "records": sum(report["records"] for report in reports),
        "bytes": sum(report["bytes"] for report in reports),
        "faults": faults,
    }


def _range(source: LlavaJson | Mixture, number: int, shards: int) -> tuple[int, int, int]:
    """(first record, end, number of records) of a shard."""
    start = len(source) * number // shards
    stop = len(source) * (number + 1) // shards
    return start, stop, stop - start


def _report(folder: Path, number: int, shards: int) -> Path:
    return folder / "examined" / f"{number:05d}-of-{shards:05d}.json"


def _write_shard(task: tuple[LlavaJson | Mixture, Path, int, int]) -> int:
    from array_record.python.array_record_module import ArrayRecordWriter

    source, folder, number, shards = task
    features = _features()
    faults = []
    size = count = 0
    path = folder / NAME.format(number, shards)
    report = _report(folder, number, shards)
    part = path.with_name(f".{path.name}.part")
    start, stop, records = _range(source, number, shards)
    writer = ArrayRecordWriter(str(part), "group_size:1")
    for index in range(start, stop):
        try:
            record, *_ = examine(source, index)
        except BadSample as error:
            faults.append((error.kind, str(error)))
            continue
        images = [io.BytesIO(path.read_bytes()) for path in record.images]  # TFDS takes files, not bytes
        value = {"id": record.id, "conversations": json.dumps(record.conversation), "images": images}
        example = features.serialize_example(features.encode_example(value))
        writer.write(example)
        size += len(example)
        count += 1
    writer.close()
    part.rename(path)
    with cache.writing(report) as unfinished:
        unfinished.write_text(json.dumps({"records": count, "bytes": size, "faults": faults}))
    return records


def _write_metadata(folder: Path, reports: list[dict]) -> None:
    import tensorflow_datasets as tfds

    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[report["records"] for report in reports],
        num_bytes=sum(report["bytes"] for report in reports),
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="llava", split="train", filetype_suffix="array_record"
        ),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=_features(), split_infos=[split], check_data=False, description="LLaVA conversations"
    )


class ArrayRecords:
    """The records of a folder that ``build`` wrote; images as bytes. Raises ConfigError for any other folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "dataset_info.json").is_file():
            raise ConfigError(
                f"data.array_record: {folder} holds no complete data set; make one with "
                "python -m deltallava_jax data build"
            )
        # dataset_info.json too, as it depends on which records the build left out.
        self.fingerprint = "".join((self.folder / name).read_text() for name in ("source.json", "dataset_info.json"))
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        class KeepEncoded(tfds.decode.SkipDecoding):
            def decode_batch_example_np(self, example):
                return example

        builder = tfds.builder_from_directory(self.folder)
        self._records = builder.as_data_source(split="train", decoders={"images": KeepEncoded()})

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_records"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Raises BadSample for a record without a list of turns."""
        found = self._records[int(index)]
        return Record(found["id"].decode(), tuple(found["images"]), json.loads(found["conversations"]))

    def texts(self) -> Iterator[str]:
        return texts(self)
