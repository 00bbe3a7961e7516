"""Pictures at the terminal and in requests."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prefkit.config.uses import TALKING
from prefkit.data.examples import Example, Message
from prefkit.data.images import MediaSource
from prefkit.model.vision import generation_inputs
from prefkit.runs.report import make_console
from prefkit.runs.use import read_use_config
from prefkit.serve.api import make_app
from prefkit.serve.assistant import Assistant, Sampling
from prefkit.serve.chat import chat
from prefkit.serve.load import load_assistant
from tests.seeing import draw, save_seeing_model
from tests.serve.serving import running_app

GREEDY = Sampling(do_sample=False, max_new_tokens=8)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    folder = save_seeing_model(tmp_path_factory.mktemp("seeing"))
    return load_assistant(read_use_config(str(folder), ["template=qwen3_vl_nothink"], TALKING).config)


def expected(assistant: Assistant, messages: list[Message], pictures: list[Path]) -> str:
    """The greedy answer, by transformers' own generate."""
    template = assistant.template
    assert template.vision is not None
    images = tuple(MediaSource(path.parent).store(path.name, "it") for path in pictures)
    texts = template.image_texts(Example(tuple(messages), (), "", images=images))
    ids = torch.tensor([template.encode(messages, [], images=texts)[0]])
    pixels = template.vision.read(images)[0] if images else {}
    model: Any = assistant.model
    output = model.generate(
        input_ids=ids, **generation_inputs(model.config, [pixels], ids), max_new_tokens=8, do_sample=False
    )
    return template.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def talk(assistant: Assistant, monkeypatch: pytest.MonkeyPatch, *lines: str) -> str:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat(assistant, GREEDY, make_console(screen))
    return screen.getvalue()


def shown(text: str) -> str:
    return "".join("\ufffd" if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 else c for c in text)


def test_pictures_are_shown_with_the_next_line_and_stay(
    seeing: Assistant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    red, blue = (tmp_path / draw(tmp_path, f"{c}.png", (40, 24), c) for c in ("red", "blue"))
    screen = talk(
        seeing, monkeypatch, f"/image {red}", "What?", f"/image {blue}", "And <image> now?", "/reset", "Hi"
    )
    assert "red.png, 40 x 24. It is shown with the next line." in screen
    said = [Message("user", "<image>What?")]
    for text, pictures in (("<image>What?", [red]), ("And <image> now?", [red, blue])):
        said = [*said[:-1], Message("user", text)] if len(said) == 1 else [*said, Message("user", text)]
        answer = expected(seeing, said, pictures)
        assert f"\n{shown(answer).expandtabs(8)}" in screen
        said.append(Message("assistant", answer))
    assert f"> Hi\n{shown(expected(seeing, [Message('user', 'Hi')], [])).expandtabs(8)}" in screen


def test_what_is_no_picture_is_said_and_nothing_is_lost(
    seeing: Assistant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("no picture")
    screen = talk(
        seeing, monkeypatch, "/image", f"/image {tmp_path}/b.png", f"/image {tmp_path}/a.txt", "<image>"
    )
    assert "/image PATH shows a picture that is here" in screen and "b.png'" in screen
    assert "not PNG, JPEG or WebP" in screen
    assert "<image> in the prompt: 1, images of the row: 0" in screen
    assert "This line was not sent." in screen


def test_a_blind_model_says_so(plain: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tiny does not see: it reads text alone." in talk(plain, monkeypatch, "/image a.png")


def part(path: Path) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def test_requests_bring_their_pictures(seeing: Assistant, tmp_path: Path) -> None:
    red = tmp_path / draw(tmp_path, "red.png", (40, 24), "red")
    blue = tmp_path / draw(tmp_path, "blue.png", (24, 24), "blue")

    def ask(*content: dict[str, Any]) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": list(content)}], "temperature": 0}
        return httpx.post(f"{to}/v1/chat/completions", json=body, timeout=60)

    def words(text: str) -> dict[str, Any]:
        return {"type": "text", "text": text}

    with running_app(make_app(seeing, GREEDY)) as to:
        reply = ask(part(red), words(" or "), part(blue), words("?")).json()
        found = reply["choices"][0]["message"]["content"]
        wanted = expected(seeing, [Message("user", "<image> or <image>?")], [red, blue])
        assert found == wanted
        assert reply["usage"]["prompt_tokens"] > 30
        for url, complaint in (
            ("/etc/passwd", "a path is not read by this server"),
            (str(red), "a path is not read by this server"),
            ("file:///etc/passwd", "is not read by this server"),
            ("https://169.254.169.254/x.png", "is not read by this server"),
            ("data:image/png;base64,AAAA", "not PNG, JPEG or WebP"),
        ):
            refused = ask({"type": "image_url", "image_url": {"url": url}}, words("?"))
            assert refused.status_code == 400, url
            assert complaint in refused.json()["error"]["message"], refused.text
        refused = ask(words("<image>?"))
        assert refused.status_code == 400 and "<image> in the prompt: 1" in refused.json()["error"]["message"]
        assert ask(*[part(blue)] * 65, words("?")).status_code == 400
