"""Pictures to train and evaluate on: folders, buckets, the training stream, procedural designs."""

from sl_jax.data._walk import Skipped, are_folders, list_files
from sl_jax.data.buckets import Bucket, make_buckets, nearest_bucket, standard_buckets
from sl_jax.data.designs import write_designs
from sl_jax.data.folder import (
    FolderError,
    PictureIndex,
    PictureRecord,
    scan_folder,
)
from sl_jax.data.layered import LayeredFolder, LayeredRecord
from sl_jax.data.loader import EvalSet, Example, StepPictures, StepPlan, TrainStream
from sl_jax.data.pictures import (
    PictureError,
    PictureLimits,
    area_size,
    longest_side_size,
    open_picture,
    open_rgba,
    picture_size,
    resize_to,
)
from sl_jax.data.sources import make_dataset, scan_pictures, training_and_held_out
from sl_jax.data.tfds_pictures import open_record
from sl_jax.data.threads import in_threads

__all__ = [
    "Bucket",
    "EvalSet",
    "Example",
    "FolderError",
    "LayeredFolder",
    "LayeredRecord",
    "PictureError",
    "PictureIndex",
    "PictureLimits",
    "PictureRecord",
    "Skipped",
    "StepPictures",
    "StepPlan",
    "TrainStream",
    "are_folders",
    "area_size",
    "in_threads",
    "list_files",
    "longest_side_size",
    "make_buckets",
    "make_dataset",
    "nearest_bucket",
    "open_picture",
    "open_record",
    "open_rgba",
    "picture_size",
    "resize_to",
    "scan_folder",
    "scan_pictures",
    "standard_buckets",
    "training_and_held_out",
    "write_designs",
]
