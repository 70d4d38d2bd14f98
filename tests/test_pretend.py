"""A card that is not there: it complains like CUDA, and whole chapters run on it."""

import os

import nbformat
import pretend
import pytest
import torch
from nbclient import NotebookClient
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import data, models, runtime
from helpers.course import notebooks

# Why a chapter is not run on a pretended card.
NOT_PRETENDED = {
    "Chapter0": "trains the embedded model for long; every operation costs thrice",
    "Chapter5": "measures a card's memory and starts processes that know no pretence",
    "Chapter6": "converts and serves files with llama.cpp, which is another program",
}


def test_a_pretended_card_complains_like_cuda():
    with pretend.pretend_cuda():
        layer = torch.nn.Linear(4, 2).to("cuda")
        x, index = torch.ones(3, 4), torch.tensor([0, 2])
        assert layer.weight.device == layer.bias.device == pretend.CARD
        assert x.device.type == "cpu" and not x.is_cuda
        for wrong in (lambda: layer(x), lambda: x @ layer.weight.T, lambda: x.cuda() + x):
            with pytest.raises(RuntimeError, match="found at least two devices, cuda:0"):
                wrong()
        moved = x.to(layer.weight.device)
        y = layer(moved) * torch.tensor(2.0)  # a single number goes with any device
        assert y.is_cuda and y[index].is_cuda and not y.cpu().is_cuda
        assert torch.zeros(2, device="cuda").is_cuda and torch.zeros_like(y).is_cuda
        x.copy_(torch.zeros(3, 4, device="cuda"))  # a copy may come from anywhere
        assert not x.is_cuda and moved.sum() == 12 and x.sum() == 0
        with pytest.raises(RuntimeError, match="when computing index"):
            x[index.cuda()]
    assert x.device.type == layer.weight.device.type == "cpu"


def test_numbers_and_gradients_on_a_pretended_card_are_those_of_the_cpu():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 8), torch.randn(5, 8)
    layer(x).square().sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    with pretend.pretend_cuda():
        layer.to("cuda")
        layer(x.cuda()).square().sum().backward()
        assert layer.weight.grad.is_cuda
        optimizer = torch.optim.AdamW(layer.parameters())
        optimizer.step()
        layer.to("cpu")
        layer(x)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a real card")
def test_models_and_trainers_are_put_on_the_pretended_card(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    with pretend.pretend_cuda():
        here = runtime.detect()
        assert (here.device, here.profile, here.offline) == ("cuda", "gpu", True)
        tokenizer = models.load_tokenizer(models.EMBEDDED)
        config = LlamaConfig(**shape, num_attention_heads=2, vocab_size=len(tokenizer))
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        for quantization in (None, "nf4", "int8"):
            model = models.load_model(str(tmp_path), quantization=quantization)
            assert model.device == pretend.CARD
            inputs = tokenizer("Hello", return_tensors="pt")
            model(**inputs.to(model.device))
            with pytest.raises(RuntimeError, match="two devices"):
                model(**inputs.to("cpu"))
        settings = {"save_strategy": "no", "max_steps": 2, "report_to": "none"}
        for use_cpu, place in ((False, "cuda"), (True, "cpu")):
            trainer = SFTTrainer(
                LlamaForCausalLM(config),
                args=SFTConfig(str(tmp_path), use_cpu=use_cpu, bf16=False, **settings),
                train_dataset=data.load_yoda("train").select(range(4)),
                processing_class=tokenizer,
            )
            trainer.train()
            assert trainer.model.device.type == place
    after = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    assert (runtime.detect() == here, after.device.type) == (False, "cpu")


@pytest.mark.environments
@pytest.mark.parametrize("chapter", notebooks.written())
def test_a_chapter_runs_on_a_pretended_card(chapter, tmp_path, monkeypatch):
    if chapter in NOT_PRETENDED:
        pytest.skip(NOT_PRETENDED[chapter])
    notebook = nbformat.read(notebooks.find(chapter), as_version=4)
    second = [i for i, c in enumerate(notebook.cells) if c.cell_type == "code"][1]
    cell = nbformat.v4.new_code_cell("from pretend import pretend_cuda\n\npretend_cuda();")
    notebook.cells.insert(second, cell)
    paths = [str(notebooks.root()), str(notebooks.root() / "tests")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=3600, resources=where).execute()
