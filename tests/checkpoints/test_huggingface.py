"""Loading and writing checkpoint folders: shards, meshes, dtypes, and everything that is wrong."""

import json
import math
import re
import shutil
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from bucket import Bucket
from etils.epath import backend
from flax import traverse_util
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from sl_jax.checkpoints import huggingface, loading
from sl_jax.checkpoints.byte_ranges import RemoteFile
from sl_jax.checkpoints.huggingface import (
    CheckpointError,
    TensorFiles,
    load_params,
    local_path,
    named_tensors,
    read_config,
    save_params,
)
from sl_jax.checkpoints.naming import MMDIT
from sl_jax.checkpoints.pipeline import ComputeConfig, abstract_params, load_pipeline, load_vae
from sl_jax.checkpoints.source import resolve_model
from sl_jax.inference import encode_prompts, prompts
from sl_jax.models.mmdit import MMDiT, MMDiTConfig
from sl_jax.parallel.mesh import Layout, MeshConfig, make_mesh
from sl_jax.parallel.processes import to_everywhere

CONFIG = MMDiTConfig(3, 16, 2, 12, axes_dims_rope=(4, 6, 6))
BOXED = abstract_params(MMDiT(CONFIG))
SHAPES = nn.unbox(BOXED)
STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
LAST = "transformer_blocks.2.txt_mod.1.bias"


def flat(tree):
    return traverse_util.flatten_dict(tree)


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), SHAPES)


@pytest.fixture(scope="module")
def sharded():
    """Shapes as they are laid out over 4 × 2 of the eight devices."""
    return Layout(make_mesh(MeshConfig(fsdp=4, tensor=2))).abstract(BOXED)


@pytest.fixture(params=[True, False], ids=["shards", "one file"])
def folder(request, params, tmp_path, monkeypatch):
    if request.param:
        monkeypatch.setattr(huggingface, "_MAX_SHARD_BYTES", 40_000)
    save_params(tmp_path, named_tensors(MMDIT, params), CONFIG.to_dict())
    assert (tmp_path / INDEX).exists() == request.param
    return tmp_path


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs:// is `tmp_path`."""
    return Bucket.install(tmp_path, monkeypatch)


def edit_tensors(folder, change):
    """Rewrites the single weights file of `folder` with `change` applied to its tensors."""
    file = folder / f"{STEM}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def assert_equal_trees(found, wanted):
    assert flat(found).keys() == flat(wanted).keys()
    for path, leaf in flat(found).items():
        np.testing.assert_array_equal(leaf, flat(wanted)[path], err_msg=str(path))


def test_files_of_a_folder(folder):
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / INDEX).exists():
        assert [file.name for file in files] == [f"{STEM}.safetensors"]
        return
    count = len(files)
    assert count > 3
    assert files[1].name == f"{STEM}-00002-of-{count:05d}.safetensors"
    index = json.loads((folder / INDEX).read_text())
    sizes = Counter()
    for file in files:
        for name, tensor in load_file(file).items():
            assert index["weight_map"][name] == file.name
            sizes[file.name] += tensor.nbytes
    assert max(sizes.values()) <= 40_000
    assert index["metadata"]["total_size"] == sum(sizes.values())


def test_sharded_arrays_hold_the_values(folder, params, sharded):
    loaded = load_params(folder, MMDIT, sharded)
    assert_equal_trees(loaded, params)
    for path, leaf in flat(loaded).items():
        assert leaf.sharding == flat(sharded)[path].sharding, path
    query = loaded["blocks"]["attn"]["to_q"]
    assert query["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert query["kernel"].addressable_shards[0].data.shape == (3, 8, 16)
    assert query["bias"].addressable_shards[0].data.shape == (3, 16)
    out = loaded["blocks"]["img_mlp"]["net_2"]["kernel"]
    assert out.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert loaded["txt_norm"]["scale"].sharding.is_fully_replicated


@pytest.fixture
def reads(monkeypatch):
    """Bytes asked of each tensor."""
    counted = Counter()
    read = TensorFiles.read

    def spy(files, name, index=()):
        part = read(files, name, index)
        counted[name] += part.nbytes
        return part

    monkeypatch.setattr(TensorFiles, "read", spy)
    return counted


def tensor_bytes(folder):
    with TensorFiles(folder) as files:
        return {name: 4 * math.prod(files.shape(name)) for name in files.names()}


@pytest.mark.parametrize(
    ("mesh", "turns"),
    [
        # How often the rows of img_mlp.net.0.proj are passed, one shard at a time.
        (MeshConfig(fsdp=8), 8),
        (MeshConfig(fsdp=1, tensor=8), 1),
        (MeshConfig(fsdp=4, tensor=2), 4),
        (MeshConfig(data=8, fsdp=1), 1),
    ],
)
def test_shards_of_rows_are_read_once(folder, params, reads, mesh, turns):
    """Mapped memory that holds parts of rows is passed once for every part of them."""
    loaded = load_params(folder, MMDIT, Layout(make_mesh(mesh)).abstract(BOXED))
    wanted = tensor_bytes(folder)
    for name in (f"transformer_blocks.{i}.img_mlp.net.0.proj.weight" for i in range(3)):
        assert reads[name] == turns * wanted[name]
    assert reads["transformer_blocks.0.img_mlp.net.0.proj.bias"] == 4 * 128
    assert_equal_trees(loaded, params)


class _OneHost:
    """As on a host with some of the eight devices: the parts that it would hold, by bounds."""

    def __init__(self, monkeypatch, devices):
        self.buffers = {}
        places, filled = loading.places_of, loading.Loader._filled

        def own(shape, sharding):
            every = places(shape, sharding)
            return {
                b: [d for d in ds if d in devices]
                for b, ds in every.items()
                if set(ds) & set(devices)
            }

        def noted(loader, source, leaf, group):
            found = filled(loader, source, leaf, group)
            self.buffers.update({(source.names, bounds): found[bounds] for bounds in found})
            return dict(found)

        monkeypatch.setattr(loading, "places_of", own)
        monkeypatch.setattr(loading.Loader, "_filled", noted)
        monkeypatch.setattr(
            jax, "make_array_from_single_device_arrays", lambda shape, *_: jnp.zeros(shape)
        )


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2)])
def test_one_process_reads_the_bytes_of_its_own_shards(tmp_path, params, bucket, monkeypatch, mesh):
    """Two of eight devices: a quarter of the bytes in shares that are exchanged afterwards."""
    save_params(tmp_path / "bucket" / "model", named_tensors(MMDIT, params), CONFIG.to_dict())
    leaves = flat(Layout(make_mesh(mesh)).abstract(BOXED))
    path = ("blocks", "img_mlp", "net_0", "proj", "kernel")
    source = MMDIT.source(path, leaves[path].shape)
    rows = loading.by_rows(source, leaves[path].shape, leaves[path].sharding)
    host = _OneHost(monkeypatch, jax.devices()[2:4])
    with TensorFiles("gs://bucket/model") as files, loading.Loader(files, []) as loader:
        bucket.asked.clear()
        loader._placed(source, leaves[path], rows)
    size = math.prod(leaves[path].shape) * 4
    assert sum(end - begin for _, begin, end in bucket.asked) == size / 4
    whole = flat(params)[path]
    for (_, bounds), buffer in host.buffers.items():
        np.testing.assert_array_equal(buffer, whole[tuple(slice(*ends) for ends in bounds)])
    assert sum(buffer.nbytes for buffer in host.buffers.values()) == size / 4


def test_exchanged_shares_are_the_shards(folder, params, sharded, reads):
    leaves = flat(sharded)
    wanted = tensor_bytes(folder)
    with TensorFiles(folder) as files, loading.Loader(files, [], True) as loader:
        for path, leaf in leaves.items():
            array = loader.load(MMDIT.source(path, leaf.shape), leaf)
            assert array.sharding == leaf.sharding
            np.testing.assert_array_equal(array, flat(params)[path])
    linear = [name for name in wanted if name.endswith("weight") and "norm" not in name]
    assert {name: reads[name] for name in linear} == {name: wanted[name] for name in linear}


def _names():
    shapes = {path: leaf.shape for path, leaf in flat(SHAPES).items()}
    return [n for _, source in huggingface.sources(MMDIT, shapes) for n in source.names]


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("wanted", [jnp.bfloat16, jnp.float32])
def test_dtypes_of_files_and_of_parameters(tmp_path, params, sharded, stored, wanted):
    save_params(tmp_path, named_tensors(MMDIT, params, stored), CONFIG.to_dict())
    with TensorFiles(tmp_path) as files:
        assert files.read("proj_out.bias").dtype == stored
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wanted, sharding=leaf.sharding), sharded
    )
    loaded = load_params(tmp_path, MMDIT, abstract)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(wanted)}
    rounded = jax.tree.map(lambda leaf: leaf.astype(stored).astype(wanted), params)
    assert_equal_trees(loaded, rounded)


def test_one_tensor_at_a_time_is_fetched(params, sharded):
    """Of stacked parameters a layer: no device or host holds all of one whole."""
    spread = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, sharded)
    mesh = jax.tree.leaves(sharded)[0].sharding.mesh
    fetched = []

    def whole(array):
        fetched.append(array.size)
        return to_everywhere(array, mesh)

    found = dict(named_tensors(MMDIT, spread, whole=whole))
    assert fetched == [tensor.size for tensor in found.values()]
    assert_equal_trees(found, dict(named_tensors(MMDIT, params)))


def test_without_shardings_arrays_are_on_one_device(tmp_path, params):
    save_params(tmp_path, named_tensors(MMDIT, params), CONFIG.to_dict())
    loaded = load_params(tmp_path, MMDIT, SHAPES)
    assert_equal_trees(loaded, params)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(loaded)} == {1}


def test_all_that_does_not_fit_is_one_error(tmp_path, params):
    save_params(tmp_path, named_tensors(MMDIT, params), CONFIG.to_dict())

    def change(tensors):
        for name in ("img_in.bias", "transformer_blocks.1.attn.to_q.weight"):
            del tensors[name]
        tensors["proj_out.weight"] = np.zeros((32, 64), np.float32)
        tensors["transformer_blocks.2.txt_mlp.net.2.bias"] = np.zeros(31, np.float32)
        tensors["transformer_blocks.3.attn.to_k.bias"] = np.zeros(32, np.float32)
        tensors["extra.scale"] = np.zeros(1, np.float32)

    edit_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))) as error:
        load_params(tmp_path, MMDIT, SHAPES)
    assert set(str(error.value).split("\n  ")[1:]) == {
        "missing: img_in.bias (32,)",
        "missing: transformer_blocks.1.attn.to_q.weight (32, 32)",
        "shape of proj_out.weight: (32, 64), expected (64, 32)",
        "shape of transformer_blocks.2.txt_mlp.net.2.bias: (31,), expected (32,)",
        "surplus: transformer_blocks.3.attn.to_k.bias",
        "surplus: extra.scale",
    }


def test_unused_tensors_are_named(tmp_path, params):
    save_params(tmp_path, named_tensors(MMDIT, params), CONFIG.to_dict())
    edit_tensors(tmp_path, lambda tensors: tensors.update({"extra.scale": np.zeros(1)}))
    assert_equal_trees(load_params(tmp_path, MMDIT, SHAPES, unused=("extra.",)), params)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / f"{STEM}.bin").write_bytes(b"cos\nsystem\n")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"only pickled weights \({STEM}.bin, model.pt\)"):
        load_params(tmp_path, MMDIT, SHAPES)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors files"):
        load_params(tmp_path, MMDIT, SHAPES)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(folder, keep):
    victim = sorted(folder.glob("*.safetensors"))[-1]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{victim.name} is truncated or damaged"):
        load_params(folder, MMDIT, SHAPES)


def rewrite_header(file, change):
    """Changes the header's content, and leaves the tensors as they are."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: h[LAST]["data_offsets"].__setitem__(1, 10**9),
            r"tensor {}, .*cannot have \d+ b",
        ),
        (lambda h: h[LAST].update(shape=[10**6]), "tensor {}, .*cannot have"),
        (lambda h: h.update({LAST: h.pop(LAST) | {"dtype": "F64"}}), "tensor {}, .*cannot have"),
        (lambda h: h.pop(LAST), "tensor .* begins at byte .* was to come"),
        (lambda h: h[LAST].update(data_offsets=[0, 128]), "tensor .* begins at byte .*to come"),
        (lambda h: h[LAST].update(data_offsets=[3]), "no safetensors header"),
        (lambda h: h[LAST].pop("dtype"), "no safetensors header"),
        (lambda h: h.update({LAST: 3}), "no safetensors header"),
    ],
)
def test_a_damaged_header_names_file_and_tensor(tmp_path, params, change, message):
    save_params(tmp_path, named_tensors(MMDIT, params), CONFIG.to_dict())
    file = tmp_path / f"{STEM}.safetensors"
    rewrite_header(file, change)
    wanted = f"{file} is truncated or damaged: .*{message.format(re.escape(LAST))}"
    with pytest.raises(CheckpointError, match=wanted):
        load_params(tmp_path, MMDIT, SHAPES)


def test_bytes_that_belong_to_no_tensor(folder):
    victim = sorted(folder.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes() + bytes(3))
    with pytest.raises(CheckpointError, match=f"{victim.name}.*: 3 bytes belong to no tensor"):
        load_params(folder, MMDIT, SHAPES)


def test_the_tensor_that_a_truncated_file_lacks_is_named(folder):
    victim = sorted(folder.glob("*.safetensors"))[0]
    header = json.loads(victim.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"])
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{victim.name}.*tensor {re.escape(last)} ends at"):
        load_params(folder, MMDIT, SHAPES)


def test_numbers_that_are_not_finite_are_no_damage(tmp_path, params):
    odd = jax.tree.map(np.copy, params)
    flat(odd)[("proj_out", "bias")][:3] = np.nan, np.inf, -np.inf
    save_params(tmp_path, named_tensors(MMDIT, odd), CONFIG.to_dict())
    assert_equal_trees(load_params(tmp_path, MMDIT, SHAPES), odd)


def test_types_that_are_not_read_are_named(tmp_path, params):
    save_params(tmp_path, named_tensors(MMDIT, params), CONFIG.to_dict())
    rewrite_header(
        tmp_path / f"{STEM}.safetensors", lambda header: header[LAST].update(dtype="F4_NEW")
    )
    with pytest.raises(CheckpointError, match=f"{re.escape(LAST)} is of type F4_NEW"):
        load_params(tmp_path, MMDIT, SHAPES)


def test_an_index_that_disagrees_with_the_files(tmp_path, params, monkeypatch):
    monkeypatch.setattr(huggingface, "_MAX_SHARD_BYTES", 40_000)
    save_params(tmp_path, named_tensors(MMDIT, params), CONFIG.to_dict())
    index = json.loads((tmp_path / INDEX).read_text())
    file = index["weight_map"]["proj_out.bias"]
    index["weight_map"]["no.such"] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{file} lacks tensor no.such"):
        load_params(tmp_path, MMDIT, SHAPES)


def test_an_index_that_names_absent_files(tmp_path, params, monkeypatch):
    monkeypatch.setattr(huggingface, "_MAX_SHARD_BYTES", 40_000)
    save_params(tmp_path, named_tensors(MMDIT, params), CONFIG.to_dict())
    gone = sorted(file.name for file in tmp_path.glob("*.safetensors"))[1:3]
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"files that are not there: {gone}")):
        load_params(tmp_path, MMDIT, SHAPES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"weight_map": {', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b"{}", "no object 'weight_map'"),
        (b'{"weight_map": ["a"]}', "no object 'weight_map'"),
    ],
)
def test_a_damaged_index(tmp_path, content, message):
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{INDEX} .*{message}"):
        load_params(tmp_path, MMDIT, SHAPES)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not valid JSON"), (b"\xff", "is not valid JSON"), (b"null", "not a NoneType")],
)
def test_a_damaged_config(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json .*{message}"):
        read_config(tmp_path)


def test_an_absent_config(tmp_path):
    with pytest.raises(CheckpointError, match="diffusers folder layout"):
        read_config(tmp_path)


def test_two_sets_of_weights_beside_each_other(tmp_path, params):
    save_params(tmp_path, named_tensors(MMDIT, params), CONFIG.to_dict())
    shutil.copy(tmp_path / f"{STEM}.safetensors", tmp_path / f"{STEM}.fp16.safetensors")
    with pytest.raises(CheckpointError, match="keep one set of weights"):
        load_params(tmp_path, MMDIT, SHAPES)


def test_writing_again_leaves_nothing_of_the_earlier_weights(folder, params, monkeypatch):
    for limit in (50_000, 2**40, 40_000):
        monkeypatch.setattr(huggingface, "_MAX_SHARD_BYTES", limit)
        params = jax.tree.map(lambda leaf: leaf + 1, params)
        save_params(folder, named_tensors(MMDIT, params), CONFIG.to_dict())
        assert_equal_trees(load_params(folder, MMDIT, SHAPES), params)
        with TensorFiles(folder) as files:
            assert files.names() == set(_names())


def test_remote_weights_ask_for_a_copy():
    with pytest.raises(CheckpointError, match=r"gs://bucket/model.* copy the folder to a local"):
        local_path("gs://bucket/model")


@pytest.mark.parametrize("shards", [True, False])
def test_remote_folders(tmp_path, params, sharded, bucket, monkeypatch, shards):
    """No file is fetched whole, and no byte twice."""
    if shards:
        monkeypatch.setattr(huggingface, "_MAX_SHARD_BYTES", 40_000)
    save_params(tmp_path / "bucket/model", named_tensors(MMDIT, params), CONFIG.to_dict())
    assert read_config("gs://bucket/model") == read_config(tmp_path / "bucket/model")
    with TensorFiles("gs://bucket/model") as files:
        sizes = {f.name: f.stat().st_size for f in (tmp_path / "bucket/model").iterdir()}
        assert len(files.names()) == len(_names())
    bucket.asked.clear()
    assert_equal_trees(load_params("gs://bucket/model", MMDIT, sharded), params)
    weights = [a for a in bucket.asked if a[0].endswith(".safetensors")]
    assert sum(end - begin for _, begin, end in weights) == sum(
        size for name, size in sizes.items() if name.endswith(".safetensors")
    )
    assert max(end - begin for _, begin, end in weights) <= max(
        tensor_bytes(tmp_path / "bucket/model").values()
    )


def test_without_a_file_system_that_reads_ranges(tmp_path, params, bucket, monkeypatch):
    """As with TensorFlow's files, which are opened and sought."""
    save_params(tmp_path / "bucket/model", named_tensors(MMDIT, params), CONFIG.to_dict())
    init = RemoteFile.__init__

    def bare(file, path):
        init(file, path)
        file._store = None

    monkeypatch.setattr(RemoteFile, "__init__", bare)
    assert_equal_trees(load_params("gs://bucket/model", MMDIT, SHAPES), params)


def test_remote_answers_that_are_cut_short(tmp_path, params, bucket):
    save_params(tmp_path / "bucket/model", named_tensors(MMDIT, params), CONFIG.to_dict())
    with TensorFiles("gs://bucket/model") as files:
        bucket.cut = 4
        message = rf"gs://bucket/model/{STEM}.safetensors is truncated: of tensor proj_out.bias"
        with pytest.raises(CheckpointError, match=message):
            files.read("proj_out.bias")


def test_a_store_without_its_package(monkeypatch):
    def absent(name, **_):
        raise ImportError(f"no file system for {name}")

    monkeypatch.setattr("fsspec.filesystem", absent)
    backend.fsspec_backend._get_filesystem.cache_clear()
    for call in (resolve_model, TensorFiles):
        with pytest.raises(CheckpointError, match=r"extra gcs, as in pip install -e '\.\[gcs\]'"):
            call("gs://bucket/model")
    with pytest.raises(CheckpointError, match="please install it by pip install s3fs"):
        resolve_model("s3://bucket/model")
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_stores_that_do_not_answer(tmp_path, bucket, monkeypatch):
    def lost(*_, **__):
        raise ConnectionResetError("nobody at home")

    monkeypatch.setattr(bucket, "info", lost)
    monkeypatch.setattr(bucket, "exists", lost)
    with pytest.raises(CheckpointError, match="gs://bucket/x cannot be reached: nobody at home"):
        resolve_model("gs://bucket/x")
    for name in ("http://host/model", "GS://bucket/model"):
        with pytest.raises(CheckpointError, match=f"{name} is on no store that is known"):
            resolve_model(name)


def test_a_whole_remote_pipeline(random_checkpoint, tmp_path, bucket):
    shutil.copytree(random_checkpoint, tmp_path / "bucket/deep/model")
    folder = resolve_model("gs://bucket/deep/model")
    compute, layout = ComputeConfig("float32"), Layout(make_mesh(MeshConfig()))
    remote, local = (load_pipeline(f, compute, layout) for f in (folder, random_checkpoint))
    assert_equal_trees(remote.params, local.params)
    assert_equal_trees(remote.vae_params, local.vae_params)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        resolve_model("gs://bucket/none")


def test_prompts_of_a_remote_checkpoint(tmp_path, bucket, monkeypatch):
    tiny, texts = resolve_model("tiny"), ["a prompt", ""]
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket/tiny").symlink_to(tiny)
    cache = tmp_path / "cache"
    found = encode_prompts("gs://bucket/tiny", texts, cache_dir=cache, dtype=np.float32)
    wanted = encode_prompts(tiny, texts, dtype=np.float32)
    np.testing.assert_array_equal(found.hidden, wanted.hidden)
    monkeypatch.setattr(prompts, "_encode", None)  # the same content: taken from the cache
    encode_prompts(tiny, texts, cache_dir=cache, dtype=np.float32)


def test_temporal_tensors_of_the_autoencoder_are_passed_over(random_checkpoint):
    with TensorFiles(random_checkpoint / "vae") as files:
        names = {name for name in files.names() if "time_conv" in name}
    assert len(names) == 8
    _, params = load_vae(random_checkpoint / "vae", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_components_that_do_not_fit_together(random_checkpoint, tmp_path):
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        content = read_config(random_checkpoint / part)
        (tmp_path / part / "config.json").write_text(
            json.dumps(content | ({"in_channels": 32} if part == "transformer" else {}))
        )
    content |= {"input_channels": 3, "dim_mult": [1, 2], "temperal_downsample": [True]}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(content))
    layout = Layout(make_mesh(MeshConfig()))
    with pytest.raises(CheckpointError) as error:
        load_pipeline(tmp_path, ComputeConfig("float32"), layout)
    for part in ("input_channels 3, not 4", "per latent 2, not 8", "in_channels 32, not 64"):
        assert part in str(error.value)


def test_names_of_models(tmp_path):
    assert (resolve_model("tiny") / "text_encoder" / "config.json").exists()
    with pytest.raises(CheckpointError, match=r"it has no model_index.json; please pass"):
        resolve_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    assert str(resolve_model(str(tmp_path))) == str(tmp_path)
    names = ("no-such-folder", "./no", "./no/such", "~no/such", "a/b/c", "no such/name", "a..b/c")
    for name in (*names, "no/such/", "owner/name.git"):
        with pytest.raises(CheckpointError, match="is no checkpoint: there is no folder"):
            resolve_model(name)


def _answer(kind):
    """An error of the hub's client, without the answer of a server that it is made of."""
    return kind.__new__(kind, "a page\nof text")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("a page\nof text"), "it cannot be reached, and its cache lacks"),
        (ConnectionError("a page\nof text"), "it cannot be reached, and its cache lacks"),
        (_answer(RepositoryNotFoundError), "it knows no such repository, or shows it to others"),
        (_answer(GatedRepoError), "please give it at https://huggingface.co/owner/name, and log"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_the_hub_gives_no_model(monkeypatch, error, message):
    def snapshot(name, **_):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match=message) as raised:
        resolve_model("owner/name")
    assert str(raised.value).startswith("there is no folder owner/name, and the hub gives none: ")
    assert len(str(raised.value).splitlines()) == 1


def test_of_the_hub_only_checkpoints_are_fetched(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, **patterns):
        asked.append(patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match=r"'owner/name' on the hub has no model_index.json"):
        resolve_model("owner/name")
    index = {"allow_patterns": ["model_index.json"]}
    assert asked == [index]
    (tmp_path / "model_index.json").write_text("{}")
    assert str(resolve_model("owner/name", ["vae/*"])) == str(tmp_path)
    assert resolve_model("owner/name") == resolve_model("owner/name", ["vae/*"])
    some = {"allow_patterns": ["model_index.json", "vae/*"]}
    assert asked[1:5] == [index, some, index, {"allow_patterns": None}]
