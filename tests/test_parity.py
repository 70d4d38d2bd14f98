"""Prompts of training against prompts of serving, in the engines that serve."""

import functools
import shutil

import gguf
import numpy as np
import pytest
from chat_families import FAMILIES, conversations
from chat_families import tokenizer as fresh

from helpers import serving
from helpers.serving import parity

GO = pytest.mark.skipif(not shutil.which("go"), reason="needs Go: apt-get install golang-go")
TALKS = conversations(200)
tokenizer = functools.cache(fresh)  # nothing here changes one


def modelfile(family, change=lambda text: text):
    return change(serving.ollama_modelfile(tokenizer(family), "x.gguf"))


def test_the_conversations_are_as_odd_as_they_should_be():
    contents = [m["content"] for talk in TALKS for m in talk]
    assert any(not c for c in contents), "empty content"
    for odd in ('"', "{{", "\n", "汉", "🙂", "\\"):
        assert any(odd in c for c in contents), odd
    roles = [talk[0]["role"] for talk in TALKS]
    assert 50 < roles.count("system") < 150
    assert len({len(talk) for talk in TALKS}) > 4


@GO
@pytest.mark.parametrize("family", FAMILIES)
def test_modelfile_is_exact_on_200_conversations_in_go(family):
    report = serving.template_parity(tokenizer(family), TALKS, modelfile=modelfile(family))
    assert report.exact, str(report)
    assert "its TEMPLATE in Go" in report.compared
    assert "all equal" in str(report) and "200" in report._repr_html_()


TRAPS = {
    "double_bos": (
        "llama-3",
        lambda text: text.replace('"""{{', '"""<|begin_of_text|>{{', 1),
    ),
    "missing_generation_prompt": (
        "chatml",
        lambda text: text.replace('<|im_start|>assistant\n"""', '"""', 1),
    ),
    "trailing_newline": (
        "chatml",
        lambda text: text.replace('assistant\n"""', 'assistant"""'),
    ),
    "missing_stop": ("chatml", lambda text: text.replace("PARAMETER stop", "# stop")),
    "different_text": ("chatml", lambda text: text.replace("user", "human")),
}


@GO
@pytest.mark.parametrize("code", TRAPS)
def test_each_trap_is_caught(code):
    family, change = TRAPS[code]
    broken = modelfile(family, change)
    assert broken != modelfile(family)
    report = serving.template_parity(tokenizer(family), TALKS[:6], modelfile=broken)
    assert not report.exact
    assert report.codes == {code}, str(report)
    assert parity.WHY[code] in str(report)


@GO
@pytest.mark.parametrize("template", ["{{ range }}", "{{ .NoSuchField }}"])
def test_a_template_that_go_cannot_parse_says_so(template):
    broken = f'TEMPLATE """{template}"""'
    with pytest.raises(ValueError, match="Go refuses"):
        serving.template_parity(tokenizer("chatml"), TALKS[:1], modelfile=broken)


def test_without_go_the_reason_stands_in_the_report(monkeypatch):
    monkeypatch.setenv("PATH", "")
    report = serving.template_parity(tokenizer("chatml"), TALKS[:2], modelfile=modelfile("chatml"))
    assert "golang-go" in str(report) and report.compared == ("stop words of the Modelfile",)


def test_arguments_are_checked():
    made = tokenizer("chatml")
    with pytest.raises(ValueError, match="server or modelfile"):
        serving.template_parity(made, TALKS[:1])
    with pytest.raises(ValueError, match="end with the user"):
        serving.template_parity(made, [[]], modelfile="x")


@GO
def test_a_modelfile_without_a_template_is_named():
    with pytest.raises(ValueError, match="no TEMPLATE"):
        serving.template_parity(tokenizer("chatml"), TALKS[:1], modelfile="FROM x")


# ── a GGUF file that carries its template ────────────────────────────────────────────────
def carrier(path, template, end):
    """A file with a chat template and an end token; its one tensor means nothing."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_chat_template(template)
    writer.add_eos_token_id(end)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_from_alone_serves_a_file_that_carries_its_template(family, tmp_path):
    made = tokenizer(family)
    stop = parity.stop_words(made)[0]
    end = made.convert_tokens_to_ids(stop)
    path = carrier(tmp_path / "a.gguf", made.chat_template, end)
    text = serving.ollama_modelfile(made, path, parameters={"num_ctx": 1024})
    assert text == f"FROM {path}\nPARAMETER num_ctx 1024\n"
    report = serving.template_parity(made, TALKS[:20], modelfile=text)
    assert report.exact and "the template inside its GGUF file" in report.compared, str(report)


def test_a_file_with_another_template_or_end_is_caught(tmp_path):
    made = tokenizer("chatml")
    end = made.convert_tokens_to_ids("<|im_end|>")
    other = carrier(tmp_path / "b.gguf", tokenizer("phi-3").chat_template, end)
    text = serving.ollama_modelfile(made, other)
    assert "TEMPLATE" in text, "it carries another one"
    report = serving.template_parity(made, TALKS[:2], modelfile=text)
    assert not report.differences, "and a TEMPLATE comes before that"
    report = serving.template_parity(made, TALKS[:2], modelfile=f"FROM {other}\n")
    assert report.codes == {"different_text"}
    deaf = carrier(tmp_path / "c.gguf", made.chat_template, end + 1)
    report = serving.template_parity(made, TALKS[:2], modelfile=f"FROM {deaf}\n")
    assert report.codes == {"missing_stop"}
    said = f'FROM {deaf}\nSYSTEM "Be brief."\nPARAMETER stop "<|im_end|>"\n'
    report = serving.template_parity(made, [TALKS[0][-1:]], modelfile=said)
    assert report.codes == {"different_text"} and "Be brief." in str(report)
