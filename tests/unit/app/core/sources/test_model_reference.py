from __future__ import annotations

import pytest

from app.core.errors import ModelRefused
from app.core.sources.model_reference import parse_model_reference


@pytest.mark.parametrize(
    ("reference", "normal"),
    [
        ("org/name", "hf:org/name"),
        ("gpt2", "hf:gpt2"),
        ("hf:org/na.me-1_x@v1.0", "hf:org/na.me-1_x@v1.0"),
        ("hf:org/name@refs/pr/7", "hf:org/name@refs/pr/7"),
        ("s3://bucket/some/prefix/", "s3://bucket/some/prefix"),
        ("file:///models/a%20b", "file:///models/a b"),
        ("file:///models//x/", "file:///models/x"),
    ],
)
def test_a_good_reference_is_read(reference: str, normal: str) -> None:
    assert str(parse_model_reference(reference)) == normal


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "../name",
        "org/../name",
        "org/name/extra",
        "/etc/passwd",
        "hf:org/na..me",
        "hf:.hidden/name",
        "hf:org/name@",
        "hf:org/name@../main",
        "hf:org/name@main?x=1",
        "hf:órg/name",
        "org/name\n",
        "s3://b/x",
        "s3://Bucket/x",
        "s3://bucket",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "s3://bucket/a%2e%2e/b",
        "s3://user@bucket/x",
        "file://host/models",
        "file:///models/../etc",
        "file:///models/%2e%2e/etc",
        "file:///models/%00",
        "file:///models?x",
        "file:models",
        "http://host/model",
        "https://huggingface.co/org/name",
        "[",
        "file://[",
    ],
)
def test_a_reference_with_path_parts_or_odd_characters_is_refused(reference: str) -> None:
    with pytest.raises(ModelRefused) as refusal:
        parse_model_reference(reference)
    assert refusal.value.code == "model_reference_invalid"
    assert refusal.value.remedy
