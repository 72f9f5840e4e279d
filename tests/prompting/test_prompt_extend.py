"""Prompt extension against a real HTTP server on this machine, and a real, tiny models of mlx-lm and mlx-vlm."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from mlx_wan.cli.main import main
from mlx_wan.errors import UserError, WanError
from mlx_wan.outputs import read_settings
from mlx_wan.prompting import chat
from mlx_wan.prompting.extend import extend
from mlx_wan.prompting.instructions import ONLY_A_PICTURE, system_prompt

KEY = "sk-secret-123"
SHORT = ["--steps", "1", "--frame_num", "1", "--seed", "1"]


class Server(ThreadingHTTPServer):
    """Answers with what `answers` holds, one after the other, the last one for ever; keeps what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.answers = [], [(200, "A rich red circle.")]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        answers = self.server.answers
        status, content = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == "slow":
            time.sleep(1)
            status = 200
        if status == "cut":
            self.close_connection = True
            return
        if status in ("drops", "short"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(30 if status == "drops" else 1):
                self.wfile.write(b" ")
                time.sleep(0.05)
            self.close_connection = True
            return
        if status == 200 and isinstance(content, str):
            content = {"choices": [{"message": {"role": "assistant", "content": content}}]}
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.url + "/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setattr(chat, "WAITS", (0.0, 0.0))
        yield server
        server.shutdown()


def ask(**options) -> str:
    return extend("a red circle", **{"method": "openai", "model": "m", "language": "en"} | options)


def test_what_the_server_is_asked(server):
    assert ask() == "A rich red circle."
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": system_prompt("en", False)},
            {"role": "user", "content": "a red circle"},
        ],
    }
    ask(language="zh")
    assert "Chinese" in server.asked[1][2]["messages"][0]["content"]


def test_a_picture_goes_along_and_is_described_when_there_are_no_words(server, tmp_path):
    Image.new("RGB", (3000, 1500), (200, 0, 0)).save(tmp_path / "photo.png")
    extend("", method="openai", model="m", image=tmp_path / "photo.png")
    picture, text = server.asked[0][2]["messages"][1]["content"]
    assert text == {"type": "text", "text": ONLY_A_PICTURE}
    kind, data = picture["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert sent.size == (1024, 512)
        assert sent.getpixel((5, 5))[0] > 190
    assert server.asked[0][2]["messages"][0]["content"] == system_prompt("zh", True)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('"A red circle."', "A red circle."),
        ("<think>hm,\n a circle</think>\n A red\ncircle. ", "A red circle."),
        ("“一个红圈”", "一个红圈"),
        ('"Red" and "blue"', '"Red" and "blue"'),
    ],
)
def test_answers_are_tidied(server, answer, text):
    server.answers = [(200, answer)]
    assert ask() == text


@pytest.mark.parametrize("bad", [(500, {}), (429, {}), ("cut", ""), ("short", ""), (503, b"<html>")])
def test_what_may_pass_is_tried_three_times(server, bad):
    server.answers = [bad, bad, (200, "At last.")]
    assert ask() == "At last."
    assert len(server.asked) == 3
    server.answers = [bad]
    with pytest.raises(WanError, match=r"^http://127"):
        ask()
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {"error": {"message": f"no such key {KEY}"}}), r"HTTP 401 .*: no such key \*\*\*$"),
        ((400, {"error": "odd"}), "HTTP 400"),
        ((302, {}), "HTTP 302"),
        ((200, b"not JSON"), "not that of a chat completion"),
        ((200, {"choices": []}), "not that of a chat completion"),
        ((200, {"choices": [{"message": {"content": None}}]}), "has no text"),
        ((200, "  "), "the answer is empty"),
        ((200, b" " * (chat.LARGEST_ANSWER + 1)), "too long"),
    ],
)
def test_what_will_not_pass_fails_at_once_and_never_shows_the_key(server, answer, message):
    server.answers = [answer]
    with pytest.raises(WanError, match=message) as caught:
        ask()
    assert KEY not in str(caught.value)
    assert len(server.asked) == 1  # a redirect is not followed: it would take the key along


def test_a_slow_server_runs_out_of_time(server):
    server.answers = [("slow", "too late")]
    where = chat.server("openai", "m", False)
    start = time.perf_counter()
    with pytest.raises(WanError, match="timed out"):
        chat.ask(where, [], timeout=0.1)
    assert time.perf_counter() - start < 2
    assert KEY not in repr(where)


def test_a_server_that_sends_a_little_now_and_then_runs_out_of_time(server):
    server.answers = [("drops", "")]
    where, start = chat.server("openai", "m", False), time.monotonic()
    with pytest.raises(WanError, match="timed out"):
        chat.ask(where, [], timeout=0.2)
    assert len(server.asked) == 3
    assert time.monotonic() - start < 3  # of the 4.5 that three answers take


def test_addresses_keys_and_models_come_from_the_environment():
    dash = chat.server("dashscope", None, False, {"DASH_API_KEY": "k"})
    assert (dash.url, dash.key, dash.model) == ("https://dashscope.aliyuncs.com/compatible-mode/v1", "k", "qwen-plus")
    official = {"DASH_API_KEY": "k", "DASH_API_URL": "https://dashscope-intl.aliyuncs.com/api/v1"}
    assert chat.server("dashscope", None, True, official).url == (
        "https://dashscope-intl.aliyuncs.com/compatible-mode/v1"
    )
    assert chat.server("openai", "m", False, {"OPENAI_BASE_URL": "http://localhost:8080/v1/"}).key is None
    for environ, model, message in (
        ({}, "m", "put your key into the environment variable OPENAI_API_KEY"),
        ({"OPENAI_API_KEY": "k"}, None, "say which model with --prompt_extend_model"),
        ({"OPENAI_BASE_URL": "file:///etc/passwd"}, "m", "must start with http"),
        ({"OPENAI_API_KEY": "k\nX: y"}, "m", "characters that no key has"),
    ):
        with pytest.raises(UserError, match=message):
            chat.server("openai", model, False, environ)


# --- the command line ----------------------------------------------------------------------------------------


def generate(*flags: str) -> int:
    extension = ["--use_prompt_extend", "--prompt_extend_method", "openai", "--prompt_extend_model", "m"]
    return main(["generate", "--prompt", "a red circle", *SHORT, *extension, *flags])


def test_the_extended_prompt_is_shown_kept_and_reused_without_asking(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate("-o", "a.png") == 0
    assert "note: extended prompt: A rich red circle." in capsys.readouterr().err
    facts = read_settings(tmp_path / "a.png")
    assert facts["prompt"] == "A rich red circle."
    assert facts["given_prompt"] == "a red circle"
    assert facts["prompt_extend"] == {"method": "openai", "model": "m", "target_lang": "zh"}
    assert main(["generate", "--from", "a.png", "-o", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert len(server.asked) == 1
    flags = ["--use_prompt_extend", "--prompt_extend_method", "openai", "--prompt_extend_model", "m"]
    assert (
        main(["generate", "--from", "a.png", *flags, "-o", "c.png"]) == 0
    )  # asked again: the typed words, not the rich ones
    assert server.asked[1][2]["messages"][1]["content"] == "a red circle"


def test_several_seeds_ask_once(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate("--seed", "1", "2", "-o", "a.png") == 0
    assert len(server.asked) == 1


def test_a_failing_server_leaves_the_prompt_with_one_note(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    server.answers = [(500, {"error": {"message": KEY}})]
    assert generate("-o", "a.png") == 0
    out, err = capsys.readouterr()
    assert err.count("the prompt stays as it is, because it could not be extended") == 1
    assert KEY not in out + err
    facts = read_settings(tmp_path / "a.png")
    assert facts["prompt"] == "a red circle"
    assert not {"given_prompt", "prompt_extend"} & facts.keys()
    assert KEY.encode() not in (tmp_path / "a.png").read_bytes()


def test_what_is_missing_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert generate() == 2
    assert "put your key into the environment variable OPENAI_API_KEY" in capsys.readouterr().err
    assert generate("--prompt", "") == 2
    assert "the prompt is empty, and there is no picture" in capsys.readouterr().err


# --- mlx-lm --------------------------------------------------------------------------------------------------


def write_byte_model(folder, special: list[str], template: str, **more) -> dict:
    """The files beside the weights of a Qwen2 of one layer over single bytes; returns its config."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": special[0], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": len(words),
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.fixture
def language_model(tmp_path):
    """A Qwen2 of one layer over single bytes."""
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.qwen2 import Model, ModelArgs

    folder = tmp_path / "qwen"
    config = write_byte_model(folder, ["<|endoftext|>"], "{% for m in messages %}{{ m['content'] }} {% endfor %}A")
    mx.random.seed(3)
    model = Model(ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def test_a_local_model_answers_and_answers_the_same_again(language_model):
    options = {"method": "local_qwen", "model": str(language_model), "language": "en"}
    text = extend("red circle", **options)
    assert text
    assert text != "red circle"
    assert extend("red circle", **options) == text


def test_a_local_model_that_is_not_there_leaves_the_prompt(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlx_lm")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert generate("--prompt_extend_method", "local_qwen", "--prompt_extend_model", "empty", "-o", "a.png") == 0
    assert capsys.readouterr().err.count("the prompt stays as it is") == 1


def test_without_the_packages_the_installation_is_told(monkeypatch, tmp_path):
    from mlx_wan.prompting import local

    monkeypatch.setattr(local, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs mlx-lm; install it with"):
        extend("a", method="local_qwen")
    with pytest.raises(UserError, match="needs mlx-vlm to see the picture; install it with: uv pip install mlx-vlm"):
        extend("", method="local_qwen", image=tmp_path / "photo.png")


# --- mlx-vlm -------------------------------------------------------------------------------------------------


@pytest.fixture
def looking_model(tmp_path):
    """A Qwen2-VL of one layer of each kind over single bytes; it says something else of a red and of a blue picture."""
    pytest.importorskip("mlx_vlm")
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_vlm.models.qwen2_vl import Model, ModelConfig
    from mlx_vlm.models.qwen2_vl.config import TextConfig, VisionConfig

    folder = tmp_path / "qwen-vl"
    special = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endif %} {% endfor %}A"
    )
    sizes = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    config = write_byte_model(
        folder,
        special,
        template,
        model_type="qwen2_vl",
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=1,
        tie_word_embeddings=False,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vision_config={"model_type": "qwen2_vl", "in_channels": 3, "spatial_patch_size": 14, **sizes},
    )
    pictures = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    pictures |= {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 784, "max_pixels": 313600}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    parsed = ModelConfig.from_dict(dict(config))
    parsed.text_config = TextConfig.from_dict(parsed.text_config)
    parsed.vision_config = VisionConfig.from_dict(parsed.vision_config)
    mx.random.seed(3)
    weights = {name: 3 * value for name, value in tree_flatten(Model(parsed).parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def test_a_local_model_is_shown_the_picture(looking_model, tmp_path):
    for colour in ("red", "blue"):
        Image.new("RGB", (560, 560), colour).save(tmp_path / f"{colour}.png")
    options = {"method": "local_qwen", "model": str(looking_model), "language": "en"}
    texts = [extend("look", **options, image=tmp_path / f"{colour}.png") for colour in ("red", "blue", "red")]
    assert texts[0] == texts[2]
    assert texts[0] != texts[1]
    assert extend("", **options, image=tmp_path / "red.png")  # described, with no words at all


def test_a_local_model_that_sees_nothing_leaves_the_prompt(language_model, tmp_path):
    pytest.importorskip("mlx_vlm")
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    with pytest.raises(WanError, match="sees no pictures"):
        extend("look", method="local_qwen", model=str(language_model), image=tmp_path / "red.png")
