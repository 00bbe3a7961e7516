"""The server of scores with pictures in its requests: what it reads, and what it never does."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from prefkit.config.schema import DataConfig, ModelConfig, RewardConfig  # noqa: E402
from prefkit.config.uses import SCORING  # noqa: E402
from prefkit.data import fetching  # noqa: E402
from prefkit.data.examples import Message, StoredImage  # noqa: E402
from prefkit.data.images import MediaSource  # noqa: E402
from prefkit.model.reward import load_reward_base  # noqa: E402
from prefkit.model.scorer import Scorer  # noqa: E402
from prefkit.model.vision import load_template  # noqa: E402
from prefkit.runs.use import read_use_config  # noqa: E402
from prefkit.serve import images, rewards  # noqa: E402
from prefkit.serve.load import load_scorer  # noqa: E402
from prefkit.train import reward_server  # noqa: E402
from prefkit.train.answered import Answered, JudgeFailed  # noqa: E402
from prefkit.train.reward_server import open_server_judge  # noqa: E402
from tests.seeing import draw, save_seeing_model  # noqa: E402
from tests.serve.serving import running_app  # noqa: E402

CHATS, TEXTS = "/v1/rewards", "/v1/score/evaluation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model that sees, with pictures beside it."""
    base, rater = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("models") / "rater"
    config = ModelConfig(model_name_or_path=str(save_seeing_model(base)))
    load_reward_base(config, seed=1).save_pretrained(rater)
    load_template(config, DataConfig()).saved.save_pretrained(rater)
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        draw(rater, name, colour=colour)
    return rater


@pytest.fixture(scope="module")
def seeing(folder: Path) -> Scorer:
    return load_scorer(read_use_config(str(folder), ["cutoff_len=256"], SCORING).config)


@pytest.fixture(scope="module")
def url(seeing: Scorer) -> Iterator[str]:
    with running_app(rewards.make_app(seeing)) as address:
        yield address


def uri(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def chat(address: Any, answer: str = "Red.") -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def post(url: str, path: str, **fields: Any) -> Any:
    return httpx.post(url + path, json=fields, timeout=30)


@pytest.mark.parametrize("truncate", [False, True])
def test_pictures_come_as_data(truncate: bool, url: str, seeing: Scorer, folder: Path) -> None:
    source = MediaSource(folder)
    rows = [
        seeing.encode_answer(
            [Message("user", "<image>What is it?")],
            Message("assistant", "Red."),
            images=[source.store(name, "it")],
        )
        for name in ("red.png", "blue.png")
    ]
    own = [score for (score,) in seeing.score(rows)]
    assert abs(own[0] - own[1]) > 1e-4
    chats = [chat(uri(folder / name)) for name in ("red.png", "blue.png")]
    found = post(url, CHATS, messages=chats, truncate=truncate).json()["rewards"]
    assert found == pytest.approx(own, abs=1e-5)
    text = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi."}]
    found = post(url, CHATS, messages=[text, *chats]).json()["rewards"]
    assert found[1:] == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize(
    "address",
    [
        "red.png",
        "/etc/passwd",
        "../rater/red.png",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "http://127.0.0.1/a.png",
        "https://example.com/a.png",
        "ftp://example.com/a.png",
    ],
)
def test_no_file_and_no_address_is_read(
    address: str, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any) -> bytes:
        raise AssertionError(given)

    monkeypatch.setattr(MediaSource, "_read", never)
    monkeypatch.setattr(fetching, "fetch", never)
    monkeypatch.chdir(folder)
    for given in (address, {"path": address}, {"url": address}):
        messages = chat(address)
        messages[0]["content"][0] = {"type": "image", "image": given}
        for asked in (chat(address), messages):
            reply = post(url, CHATS, messages=asked)
            assert reply.status_code == 400, reply.text
            error = reply.json()["error"]
            assert "is not read by this server: send it as data:image/png;base64" in error["message"]
            assert str(folder) not in error["message"] and error["param"] == "messages"


def test_hosts_that_were_named_may_be_asked(
    seeing: Scorer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(address: str, hosts: Any) -> bytes:
        asked.append((address, tuple(hosts)))
        return (folder / "red.png").read_bytes()

    monkeypatch.setattr(fetching, "fetch", fetch)
    with running_app(rewards.make_app(seeing, media_hosts=("example.com",))) as url:
        address = "https://example.com/a.png"
        found = [post(url, CHATS, messages=chat(it)).json() for it in (address, uri(folder / "red.png"))]
        assert found[0]["rewards"] == pytest.approx(found[1]["rewards"], abs=1e-5)
        assert post(url, CHATS, messages=chat("file:///etc/passwd")).status_code == 400
    assert asked == [(address, ("example.com",))]


def test_what_is_no_picture_is_said(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uri(folder / "red.png")
    for address, why in (
        (whole[:202], "damaged"),
        ("data:image/png;base64,!!", "not valid base64"),
        ("data:image/gif;base64,R0lGODlhAQABAAAAACw=", "not PNG, JPEG or WebP"),
        (7, "'url' of an image is a text"),
    ):
        reply = post(url, CHATS, messages=[chat(whole), chat(address)])
        assert reply.status_code == 400 and why in reply.json()["error"]["message"], reply.text
        assert reply.json()["error"]["message"].startswith("messages[1]: image 1")
    literal = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Hi."}]
    assert "<image> in the prompt: 1, images of the row: 0" in post(url, CHATS, messages=literal).text
    late = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": chat(whole)[0]["content"]}]
    assert post(url, CHATS, messages=late).status_code == 400
    token = "<|vision_start|><|image_pad|><|vision_end|>"
    assert "has the token of an image" in post(url, TEXTS, messages=[token]).text
    monkeypatch.setattr(images, "MOST_IMAGES", 1)
    reply = post(url, CHATS, messages=[chat(whole), chat(whole)])
    assert reply.json()["error"]["message"] == "There are 2 images; 1 are allowed in a request."


def test_a_model_that_does_not_see_says_so(scorer: Scorer, folder: Path) -> None:
    with running_app(rewards.make_app(scorer)) as url:
        reply = post(url, CHATS, messages=chat(uri(folder / "red.png")))
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "no_vision"


def test_a_server_as_the_judge_of_ppo_gets_pictures(
    url: str, seeing: Scorer, scorer: Scorer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MediaSource(folder)
    red, blue = (source.store(name, "it") for name in ("red.png", "blue.png"))
    asked: list[tuple[str, tuple[StoredImage, ...]]] = [
        ("<image>What is it?", (red,)),
        ("Is it <image> or <image>?", (blue, red)),
        ("Hi", ()),
        ("<image>", (blue,)),
    ]
    answered = [Answered((Message("user", text),), (), [], [2], True, "Red.", given) for text, given in asked]
    rows = [
        seeing.encode_answer(one.prompt, Message("assistant", one.text), images=one.images)
        for one in answered
    ]
    own = [score for (score,) in seeing.score(rows)]
    settings = RewardConfig(reward_model=url, reward_model_type="api")
    judge = open_server_judge(settings, seeing.template.tokenizer, lambda text: None, has_images=True)
    assert judge.score(answered) == pytest.approx(own, abs=1e-5)
    sizes = [len(fields["messages"]) for fields, _ in judge.requests(answered)]
    monkeypatch.setattr(reward_server, "_IMAGE_BYTES", len((folder / "red.png").read_bytes()) + 9)
    apart = [indices for _, indices in judge.requests(answered)]
    assert sizes == [4] and apart == [[0], [1], [2, 3]]
    assert judge.score(answered) == pytest.approx(own, abs=1e-5)
    draw(folder, "green.png", colour="green")
    gone = replace(answered[0], images=(source.store("green.png", "it"),))
    draw(folder, "green.png", colour="black")
    with pytest.raises(JudgeFailed, match=r"green\.png has other bytes"):
        judge.score([gone])
    with running_app(rewards.make_app(scorer)) as blind:
        settings = RewardConfig(reward_model=blind, reward_model_type="api")
        with pytest.raises(JudgeFailed, match="does not see, and the rows have images"):
            open_server_judge(settings, scorer.template.tokenizer, lambda text: None, has_images=True)
