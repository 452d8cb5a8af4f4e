"""Captions that a model is asked for, as the configuration words it."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from sl_jax.data import make_buckets, scan_folder, write_designs
from sl_jax.grpo.captions import captioned
from sl_jax.parallel.processes import ALONE


@pytest.mark.parametrize("own", [True, False])
def test_the_folder_of_prompts_says_how_pictures_are_asked_about(tmp_path, own):
    write_designs(tmp_path / "pictures", "A", range(2), 32, 2)
    (tmp_path / "caption.md").write_text("Tell it in $words words.")
    index, asked = scan_folder(tmp_path / "pictures", make_buckets([(32, 32)])), []

    class Endpoint:
        async def answer(self, request):
            asked.append(request.parts[0])
            return json.dumps({"caption": "two layers"})

    judge = SimpleNamespace(
        endpoint=Endpoint(), call=lambda work: SimpleNamespace(result=lambda: asyncio.run(work))
    )
    (found,) = captioned((index,), "vlm", judge, str(tmp_path) if own else "", ALONE)
    assert [record.caption for record in found] == ["two layers"] * 2
    assert all((text == "Tell it in 80 words.") == own for text in asked) and len(asked) == 2
