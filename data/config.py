"""The sections of the configuration that data/ reads: `dataset`, `audio`, `augment`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.common.errors import UserError
from utils.common.settings import MAX_SEED, MAX_SIZE, check_section, setting

CORPORA = ("icbhi", "manifest", "sprsound", "spectrograms")
#: What a part's cycles are for; official: its own halves.
ROLES = ("train", "val", "test", "official")
STRATEGIES = (
    *("official", "official_disjoint", "foldwise", "random", "leave_device_out", "training_half"),
    "recordings",
)
#: Strategies that test patients who are in the training part: their metrics are marked everywhere.
LEAKY = ("recordings",)


@dataclass
class PartConfig:
    """One of several corpora that are used together; keys that `DatasetConfig` has mean the same.

    Patients with the same number are the same person only where the label is the same.
    """

    name: str = setting(MISSING, choices=CORPORA)
    data_folder: str = setting(MISSING, path=True)
    role: str = setting(MISSING, choices=ROLES)
    label: str | None = None  # stands before patients and recordings; default: the name
    allow_shared_patients: bool = False
    allow_overlaps: bool = False
    label_map: dict[str, Any] = setting({})


@dataclass
class DatasetConfig:
    """What is read, how it is split, what a batch is."""

    # icbhi | manifest | sprsound | spectrograms | parts
    name: str = setting("icbhi", choices=(*CORPORA, "parts"))
    # folder that holds wavs, annotations and tables; manifest: the CSV; parts: left out
    data_folder: str = setting(MISSING, path=True)
    # icbhi_metadata.csv: written if absent, else checked
    cycle_metadata_path: str | None = setting(None, path=True)
    class_split: str = setting("lungsound", choices=("lungsound",))  # the only label set
    # official | official_disjoint | foldwise | random | leave_device_out | training_half (the
    # official test half is shut) | recordings (LEAKY: for comparison only)
    split_strategy: str = setting("official", choices=STRATEGIES)
    # foldwise: which of the 5 folds is the test part (0..4)
    test_fold: int = setting(0, choices=(0, 1, 2, 3, 4))
    # leave_device_out: the test part is what this device recorded
    test_device: str | None = None
    # random, training_half: seed of the patient-wise split
    split_seed: int = setting(0, low=0, high=MAX_SEED)
    # random, training_half: share of the cycles in the test part
    test_fraction: float = setting(0.4, low=0, high=1, ends="()")
    # share of the training cycles held out for validation
    val_fraction: float = setting(0.2, low=0, high=1, ends="()")
    # fixes the validation patients, independently of training.seed
    val_seed: int = setting(0, low=0, high=MAX_SEED)
    # 4: crackle and wheeze logits; 2: normal against abnormal
    n_cls: int = setting(4, choices=(4, 2))
    # cycles per optimiser step, over all processes and accumulation steps
    batch_size: int = setting(16, low=1, high=MAX_SIZE)
    h: int = setting(128, low=1, high=4096)  # mel bands, see also audio.n_mels
    w: int = setting(1024, low=1, high=MAX_SIZE)  # frames the spectrogram is fitted to
    cache_dir: str = setting("cache", path=True)  # waveform stores and frozen-backbone features
    # read every byte of the recordings to know them again; false: 40 kB of each
    full_hash: bool = False
    # error | skip (counted and reported)
    on_bad_recording: str = setting("error", choices=("error", "skip"))
    # processes that build the waveform store; 0: one per core
    store_workers: int = setting(0, low=0, high=1024)
    allow_shared_patients: bool = False  # manifest: accept patients in both halves
    allow_overlaps: bool = False  # manifest: accept overlapping cycles, as events are
    label_map: dict[str, Any] = setting({})  # sprsound: event type -> [crackle, wheeze]
    # parts: corpora used together, each with name, data_folder, role (docs/data.md)
    parts: list[PartConfig] = setting([])

    @property
    def sources(self) -> list[PartConfig] | list[DatasetConfig]:
        """The corpora that are read: the parts, or this one."""
        return self.parts or [self]

    @property
    def folders(self) -> list[str]:
        """Where the corpora lie."""
        return [source.data_folder for source in self.sources]

    @property
    def ready_made(self) -> bool:
        """Whether the cycles are spectrograms, not audio."""
        return self.sources[0].name == "spectrograms"


@dataclass
class AudioConfig:
    """Recording -> log-mel spectrogram (SI units unless the key says otherwise)."""

    sample_rate: int = setting(16000, low=1000, high=384_000)  # Hz, of the waveform store
    # torchaudio (sinc_interp_hann) | soxr_hq (librosa's)
    resampler: str = setting("torchaudio", choices=("torchaudio", "soxr_hq"))
    # s; longer cycles are cut, shorter ones padded
    clip_seconds: float = setting(10.0, low=0, high=600, ends="(]")
    # s, ascending, the last one clip_seconds: a cycle is padded to the shortest that holds it and
    # its spectrogram is that much narrower; null: every cycle to clip_seconds
    buckets: list[float] | None = setting(None, low=0, high=600, ends="(]")
    # repeat (with faded junctions) | tile (only the clip's end fades) | zero (centred)
    pad_type: str = setting("repeat", choices=("repeat", "tile", "zero"))
    frame_length_ms: float = setting(40.0, low=0, high=1000, ends="(]")  # of the analysis frames
    # from one frame to the next
    frame_shift_ms: float = setting(10.0, low=0, high=60_000, ends="(]")
    # bands of the mel bank, stretched to dataset.h; null: dataset.h
    n_mels: int | None = setting(None, low=1, high=4096)
    low_freq: float = setting(100.0, low=0)  # Hz, lower edge of the mel bank
    high_freq: float = 8000.0  # Hz, upper edge of the mel bank
    # [first, stop] of the dataset.h bands that the transformer sees; null: all
    keep_bands: list[int] | None = setting(None, low=0, interval=True)
    mean: float = -4.2677393  # AudioSet statistics: (x - mean) / (2 * std)
    std: float = setting(4.5689974, low=0, ends="(]")  # see mean
    # stretch (bilinear) | pad, to dataset.w frames
    fit: str = setting("stretch", choices=("stretch", "pad"))

    @property
    def clip_samples(self) -> list[int]:
        """Samples of a clip in each bucket, ascending."""
        return [round(s * self.sample_rate) for s in self.buckets or [self.clip_seconds]]


@dataclass
class AugmentConfig:
    """Each probability is per clip; 1 means always. Ranges are uniform."""

    enabled: bool = True  # switches all of it on or off
    noise_probability: float = setting(0.1, low=0, high=1)  # of white noise
    noise_rms: float = setting(3.2e-3, low=0)  # of the white noise, full scale = 1
    # [low, high]: noise by SNR instead of by rms
    noise_snr_db: list[float] | None = setting(None, interval=True)
    speed_probability: float = setting(0.1, low=0, high=1)  # of time-stretching
    speed_range: list[float] = setting([0.9, 1.1], low=0.1, high=10, interval=True)  # tempo factor
    loudness_probability: float = setting(0.1, low=0, high=1)  # of changing the loudness
    # amplitude factor
    loudness_range: list[float] = setting([0.5, 2.0], low=0, ends="(]", interval=True)
    vtlp_probability: float = setting(0.1, low=0, high=1)  # of vocal-tract-length perturbation
    vtlp_range: list[float] = setting([0.9, 1.1], low=0.1, high=10, interval=True)  # warp factor
    vtlp_fhi: float = setting(4800.0, low=0, ends="(]")  # Hz, boundary of the warp
    specaugment_probability: float = setting(0.3, low=0, high=1)  # of masking the spectrogram
    freq_masks: int = setting(2, low=0, high=1000)  # per masked clip
    freq_mask_width: int = setting(48, low=1, high=MAX_SIZE)  # bands, exclusive upper bound
    time_masks: int = setting(2, low=0, high=1000)  # per masked clip
    time_mask_width: int = setting(160, low=1, high=MAX_SIZE)  # frames, exclusive upper bound
    # zero | mean (of the clip's own spectrogram), after normalisation
    mask_value: str = setting("zero", choices=("zero", "mean"))


def read_dataset(file: str | Path, overrides: Sequence[str] = ()) -> DatasetConfig:
    """Section `dataset` of a YAML file, for commands that need no other; overrides: `key=value`.

    Raises:
        UserError: no such file, an unknown key, a missing or wrong value.
    """
    try:
        own = OmegaConf.create({"dataset": OmegaConf.structured(DatasetConfig)})
        given = {"dataset": OmegaConf.load(file).get("dataset") or {}}
        merged = OmegaConf.merge(own, given, OmegaConf.from_dotlist(list(overrides))).dataset
        if merged.parts:
            merged.data_folder = "several corpora"
        dataset = OmegaConf.to_object(merged)
    except (OSError, ValueError, AttributeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the section dataset of {file} cannot be read: {reason}") from None
    check_section(dataset, "dataset")
    return dataset
