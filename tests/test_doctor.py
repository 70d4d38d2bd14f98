"""The doctor: real errors are recognized, unknown ones left alone, the page is in step."""

import contextlib
import ctypes
import errno
import io
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from functools import cache
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import house
import nbformat
import pytest
import torch

from helpers import chat, data, models, runtime, serving
from helpers.course import doctor, notebooks, places
from helpers.serving import gguf, llamacpp

NAMES = doctor.SYMPTOMS
HELPERS = Path(doctor.__file__).parents[1]
PROVOKED = {}


def provokes(name):
    """Register a function that raises the symptom's real error."""

    def register(function):
        assert name in NAMES
        PROVOKED.setdefault(name, []).append(function)
        return function

    return register


class World:
    """A tiny model, a tokenizer and some rows to break things with."""

    def __init__(self, folder):
        self.folder = folder
        self.tokenizer = models.load_tokenizer(models.EMBEDDED)
        self.tokenizer.chat_template = chat.chatml_template()
        self.rows = data.load_yoda("train").select(range(4))
        self.path("empty").mkdir()
        self.model().save_pretrained(self.path("tiny"))

    def path(self, name):
        return self.folder / name

    def model(self, width=32, vocabulary=None):
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1}
        shape |= {"vocab_size": vocabulary or len(self.tokenizer)}
        config = LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True)
        return LlamaForCausalLM(config)

    def quantized(self, **settings):
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        settings = BitsAndBytesConfig(**settings or {"load_in_4bit": True})
        return AutoModelForCausalLM.from_pretrained(
            self.path("tiny"), device_map="cpu", quantization_config=settings
        )

    def settings(self, **more):
        from trl import SFTConfig

        fixed = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
        return SFTConfig(str(self.path("run")), **fixed | more)

    def trainer(self, **more):
        from trl import SFTTrainer

        given = {"processing_class": self.tokenizer, "train_dataset": self.rows}
        given |= {"model": self.model(), "args": self.settings()}
        return SFTTrainer(**given | more)

    def adapted(self, **settings):
        from peft import LoraConfig, get_peft_model

        return get_peft_model(self.model(), LoraConfig(**{"target_modules": ["q_proj"]} | settings))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("doctor"))


def questions():
    from datasets import Dataset

    return Dataset.from_list([{"q": "Why so late?", "a": "Snow."}] * 2)


# ── one function per error, each raising the real thing ──────────────────────────────────
@provokes("trainer_tokenizer")
def _(world):
    from trl import SFTTrainer

    SFTTrainer(world.model(), tokenizer=world.tokenizer)


@provokes("checkpointing")
def _(world):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        world.settings(gradient_checkpointing=False)
    return f"FutureWarning: {said[0].message}"


@provokes("settings_in_trainer")
def _(world):
    from trl import SFTTrainer

    SFTTrainer(world.model(), dataset_text_field="text")


@provokes("max_seq_length")
def _(world):
    world.settings(max_seq_length=512)


@provokes("max_seq_length")
def _(world):
    world.trainer(max_seq_length=512)


@provokes("evaluation_strategy")
def _(world):
    world.settings(evaluation_strategy="steps")


@provokes("evaluation_strategy")
def _(world):
    world.settings(evaluation_steps=5)


@provokes("logging_dir")
def _(world):
    world.settings(logging_dir="./logs")


@provokes("group_by_length")
def _(world):
    world.settings(group_by_length=True)


@provokes("overwrite_output_dir")
def _(world):
    world.settings(overwrite_output_dir=True)


@provokes("other_keyword")
def _(world):
    world.settings(no_such_setting=1)


@provokes("completion_only_collator")
def _(world):
    from trl import DataCollatorForCompletionOnlyLM  # noqa: F401


@provokes("constant_length_dataset")
def _(world):
    from trl.trainer import ConstantLengthDataset  # noqa: F401


@provokes("setup_chat_format")
def _(world):
    from trl import setup_chat_format  # noqa: F401


@provokes("dataset_formatting")
def _(world):
    from trl.extras.dataset_formatting import FORMAT_MAPPING  # noqa: F401


@provokes("special_tokens_list")
def _(world):
    world.tokenizer.additional_special_tokens  # noqa: B018


@provokes("keys_not_to_convert")
def _(world):
    from transformers.integrations import get_keys_to_not_convert  # noqa: F401


@provokes("remote_code")
def _(world):
    from transformers import DynamicCache

    DynamicCache().get_usable_length(3)


@provokes("remote_code")
def _(world):
    from transformers.utils import LossKwargs  # noqa: F401


@provokes("purely_quantized")
def _(world):
    world.trainer(model=world.quantized())


@provokes("cast_quantized")
def _(world):
    world.quantized().half()


@provokes("head_quantized")
def _(world):
    model = world.quantized(load_in_8bit=True, llm_int8_skip_modules=["q_proj"])
    model(input_ids=torch.tensor([[1, 2]]))


@provokes("packed_shapes")
def _(world):
    layer = world.quantized().model.layers[0].mlp.up_proj
    torch.randn(1, 32) @ layer.weight


@provokes("mixed_dtypes")
def _(world):
    torch.nn.Linear(4, 4).bfloat16()(torch.randn(1, 4))


@provokes("meta_tensor")
def _(world):
    torch.nn.Linear(1, 1, device="meta").to("cpu")


@provokes("flash_attention")
def _(world):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(
        world.path("tiny"), attn_implementation="flash_attention_2"
    )


@provokes("flash_attention")
def _(world):
    import flash_attn  # noqa: F401


@provokes("bitsandbytes_library")
def _(world):
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary

    try:
        ctypes.CDLL("libnvJitLink.so.999")
    except OSError as error:  # bitsandbytes keeps it until its first call
        ErrorHandlerMockBNBNativeLibrary(str(error)).cdequantize_blockwise_fp16_nf4()


@provokes("bitsandbytes_build")
def _(world):
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary

    message = "No compatible CUDA binary found at libbitsandbytes_cuda999.so"
    ErrorHandlerMockBNBNativeLibrary(message).cdequantize_blockwise_fp16_nf4()


@provokes("bitsandbytes_build")
def _(world):
    from bitsandbytes.cextension import BNBNativeLibrary

    BNBNativeLibrary(ctypes.CDLL(None)).cadam_8bit_blockwise_grad_fp32()


@provokes("hub_unreachable")
def _(world):
    from transformers import AutoConfig

    AutoConfig.from_pretrained("nobody/no-such-model", local_files_only=True)


@provokes("no_model_there")
def _(world):
    from transformers import AutoConfig

    AutoConfig.from_pretrained(world.path("empty"))


@provokes("targets_unknown")
def _(world):
    from peft import LoraConfig, get_peft_model
    from transformers import Phi3Config, Phi3ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Phi3Config(**shape, num_attention_heads=2, vocab_size=64, pad_token_id=0)
    get_peft_model(Phi3ForCausalLM(config), LoraConfig())


@provokes("targets_not_found")
def _(world):
    world.adapted(target_modules=["qkv_proj"])


@provokes("adapter_twice")
def _(world):
    from peft import LoraConfig

    world.trainer(model=world.adapted(), peft_config=LoraConfig())


@provokes("adapter_missing")
def _(world):
    from peft import PeftModel

    PeftModel.from_pretrained(world.model(), world.path("empty"))


@provokes("adapter_other_base")
def _(world):
    from peft import PeftModel

    world.adapted().save_pretrained(world.path("adapter"))
    PeftModel.from_pretrained(world.model(width=64), world.path("adapter"))


@provokes("nothing_requires_grad")
def _(world):
    ids = torch.tensor([[1, 2]])
    model = world.model().requires_grad_(False)
    model(input_ids=ids, labels=ids).loss.backward()


@provokes("empty_optimizer")
def _(world):
    frozen = world.model().requires_grad_(False)
    torch.optim.AdamW([p for p in frozen.parameters() if p.requires_grad])


@provokes("no_chat_template")
def _(world):
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.chat_template = None
    tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])


@provokes("no_markers")
def _(world):
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    world.trainer(
        args=world.settings(assistant_only_loss=True),
        train_dataset=data.load_yoda("train", form="messages").select(range(4)),
        processing_class=tokenizer,
    )


@provokes("roles")
def _(world):
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    gemma = resources.files("trl") / "chat_templates" / "gemma.jinja"
    tokenizer.chat_template = gemma.read_text("utf-8")
    tokenizer.apply_chat_template([{"role": "assistant", "content": "Hello"}])


@provokes("no_text_column")
def _(world):
    from datasets import Dataset

    rows = Dataset.from_dict({"question": ["a", "b"], "answer": ["c", "d"]})
    world.trainer(train_dataset=rows)


@provokes("formatter_refused")
def _(world):
    world.trainer(formatting_func=lambda row: row["prompt"][0]["content"])


@provokes("formatter_batched")
def _(world):
    world.trainer(train_dataset=questions(), formatting_func=lambda rows: [rows["q"]])


@provokes("formatter_batched")
def _(world):
    def book(rows):  # as for a batch: the q-th letter of the answer
        return [rows["q"][i] + rows["a"][i] for i in range(len(rows["q"]))]

    world.trainer(train_dataset=questions(), formatting_func=book)


@provokes("no_dataset")
def _(world):
    world.trainer(train_dataset=None)


@provokes("no_padding_token")
def _(world):
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.pad_token = None
    tokenizer(["short", "a longer one"], padding=True)


@provokes("unequal_rows")
def _(world):
    world.tokenizer(["short", "a longer one"], return_tensors="pt")


@provokes("token_out_of_range")
def _(world):
    world.model(vocabulary=100)(input_ids=torch.tensor([[100]]))


@provokes("bf16_without_support")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def _(world):
    from trl import SFTConfig

    SFTConfig(str(world.path("run")), bf16=True)


@provokes("scaler_float16")
def _(world):
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)


@provokes("two_devices")
def _(world):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():  # a card that need not be there
        ids, embedding = torch.tensor([1]), torch.zeros(4, 4, device="cuda:0")
        torch.nn.functional.embedding(ids, embedding)


@provokes("data_parallel")
def _(world):
    from trl import SFTConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTConfig, "n_gpu", 2)
        world.trainer()


@provokes("cpu_memory")
def _(world):
    torch.empty(10**15)


@provokes("backward_twice")
def _(world):
    ids = torch.tensor([[1, 2]])
    loss = world.model()(input_ids=ids, labels=ids).loss
    loss.backward()
    loss.backward()


@provokes("no_eval_data")
def _(world):
    world.trainer(args=world.settings(eval_strategy="steps", eval_steps=1))


@provokes("best_model")
def _(world):
    when = {"eval_strategy": "epoch", "save_strategy": "steps"}
    world.settings(load_best_model_at_end=True, **when)


@provokes("disk_full")
def _(world):
    if not os.path.exists("/dev/full"):  # as on macOS and Windows
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with open("/dev/full", "w") as file:
        file.write("x")


@provokes("no_converter")
def _(world):
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "word_embed_proj_dim": 32}
    shape |= {"vocab_size": len(world.tokenizer)}
    OPTForCausalLM(OPTConfig(**shape)).save_pretrained(world.path("opt"))
    world.tokenizer.save_pretrained(world.path("opt"))
    gguf.convert_model(world.path("opt"), world.path("opt.gguf"))


@provokes("adapter_with_embeddings")
def _(world):
    adapted = world.adapted(modules_to_save=["embed_tokens"])
    adapted.save_pretrained(world.path("with-embeddings"))
    gguf.convert_adapter(
        world.path("with-embeddings"), world.path("tiny"), world.path("adapter.gguf")
    )


@provokes("damaged_gguf")
def _(world):
    path = world.path("short.gguf")
    path.write_bytes(b"GGUF\x03\0\0\0\x05")
    gguf.inspect(path)


@provokes("port_taken")
def _(world):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        socket.create_server(taken.getsockname())


@provokes("ollama_silent")
def _(world):
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]  # free again below
    serving.ollama_chat("yoda", [], address=f"127.0.0.1:{port}")


def dies_by(name):
    """A llama.cpp of which only --version works: everything else is killed by a signal."""

    def provoke(world):
        folder = world.path(f"dies-by-{name}")
        folder.mkdir()
        for program in llamacpp.PROGRAMS:
            answer = "[ $1 = --version ] && echo 'version: 9999 (abc)' && exit"
            (folder / program).write_text(f"#!/bin/sh\n{answer}\nkill -{name} $$\n")
            (folder / program).chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(llamacpp.VARIABLE, str(folder))
            llamacpp.options("llama-server")
            return llamacpp.trouble()

    return pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")(provoke)


provokes("illegal_instruction")(dies_by("ILL"))
provokes("llamacpp_crash")(dies_by("SEGV"))
provokes("llamacpp_crash")(dies_by("ABRT"))
provokes("killed")(dies_by("KILL"))


@provokes("killed")
def _(world):
    from nbclient import NotebookClient

    cell = nbformat.v4.new_code_cell("import os, signal\nos.kill(os.getpid(), 9)")
    NotebookClient(nbformat.v4.new_notebook(cells=[cell])).execute()


@provokes("module_missing")
def _(world):
    code = "import trl"  # an interpreter without the environment's packages
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    return done.stderr


@provokes("restart_needed")
def _(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "POD_VOLUME", world.folder)
        patch.setenv("PIP_CACHE_DIR", "as it was")
        patch.delenv("HF_HOME", raising=False)
        places.use_volume()


# ── what old command lines print ─────────────────────────────────────────────────────────
def printed(world, *command, tool=None, **more):
    """What a command says, in a folder where llama.cpp has been cloned and not built."""
    if tool and shutil.which(tool) is None:
        pytest.skip(f"{tool} is not here")
    (world.path("llama.cpp") / "build").mkdir(parents=True, exist_ok=True)
    more = {"cwd": world.folder, "text": True, "capture_output": True} | more
    done = subprocess.run(list(map(str, command)), check=False, **more)
    assert done.returncode
    return done.stdout + done.stderr


def leaves(main, *arguments):
    """What a command says on its way out, run in this process."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit):
            main()
    return said.getvalue()


def not_installed(program):
    """The programs of this environment and the system's own, in the shell's words."""

    def provoke(world):
        path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
        return printed(world, "sh", "-c", f"{program} login", tool="sh", env={"PATH": path})

    return provoke


provokes("huggingface_cli")(not_installed("huggingface-cli"))
provokes("transformers_cli")(not_installed("transformers-cli"))


@provokes("trl_command")
def _(world):
    from trl.cli.main import main

    return leaves(main, "chat", "--model_name_or_path", "tiny")


TRAINED = ["--output_dir", "run", "--dataset_name", "yoda", "--use_cpu", "--bf16", "False"]


@provokes("trl_option")
def _(world):
    from trl.cli.main import main

    return leaves(main, "sft", *TRAINED, "--model_name_or_path", "tiny", "--max_seq_length", "9")


@provokes("trl_option")
def _(world):
    from trl.scripts.sft import make_parser

    given = [*TRAINED, "--model_name_or_path", "tiny", "--torch_dtype", "bfloat16"]
    make_parser().parse_args_and_config(given)


@provokes("launch_option")
def _(world):
    from accelerate.commands.accelerate_cli import main

    return leaves(main, "launch", "--fp16", "train.py")


@provokes("module_gone")
def _(world):
    runpy.run_module("transformers.models.llama.convert_llama_weights_to_hf")


@provokes("trl_script")
def _(world):
    return printed(world, sys.executable, "trl/examples/scripts/sft.py")


@provokes("llamacpp_script")
def _(world):
    return printed(world, sys.executable, "llama.cpp/convert.py", "tiny")


@provokes("llamacpp_script")
def _(world):
    return printed(world, sys.executable, "llama.cpp/convert-hf-to-gguf.py", "tiny")


@provokes("llamacpp_script")
def _(world):
    wanted = "llama.cpp/requirements/requirements-convert-hf-to-gguf.txt"
    return printed(world, sys.executable, "-m", "pip", "install", "-r", wanted)


@provokes("llamacpp_program")
def _(world):
    return printed(world, "sh", "-c", "./llama.cpp/quantize a.gguf b.gguf q4_0", tool="sh")


@provokes("llamacpp_program")
def _(world):
    return printed(world, "bash", "-c", "./llama.cpp/main -m a.gguf", tool="bash")


@provokes("llamacpp_program")
def _(world):
    subprocess.run(["./llama.cpp/server", "-m", "a.gguf"], cwd=world.folder, check=False)


def converter(*arguments):
    """The converter's own refusal: it reads its arguments before anything else."""

    def provoke(world):
        script = llamacpp.source_folder() / "convert_hf_to_gguf.py"
        return printed(world, sys.executable, script, "tiny", *arguments)

    return provoke


provokes("converter_option")(converter("--outtype", "q4_k_m"))
provokes("converter_option")(converter("--vocab-type", "bpe"))


def llamacpp_says(program, *arguments):
    """What a program of llama.cpp says, where there is one."""

    def provoke(world):
        if (found := llamacpp.find(program)) is None:
            pytest.skip(f"{program} is not here")
        old = world.path("old.ggmlv3.q4_0.bin")
        old.write_bytes(b"tjgg" + b"\x03\0\0\0" * 9)
        return printed(world, found, *arguments)

    return provoke


provokes("llamacpp_option")(llamacpp_says("llama-server", "-m", "a.gguf", "--mlock"))
provokes("llamacpp_option")(llamacpp_says("llama-server", "-m", "a.gguf", "-fa", "-c", "9"))
provokes("ggml_file")(llamacpp_says("llama-quantize", "old.ggmlv3.q4_0.bin", "a.gguf", "Q4_0"))


@provokes("makefile")
def _(world):
    return printed(world, "make", "-C", llamacpp.source_folder(), "quantize", tool="make")


@provokes("build_option")
def _(world):
    build = ["-B", world.path("cublas"), "-DLLAMA_CUBLAS=ON"]
    return printed(world, "cmake", "-S", llamacpp.source_folder(), *build, tool="cmake")


@provokes("llamacpp_tools")
def _(world):
    return printed(world, "ls", "llama.cpp/examples/server/README.md", tool="ls")


@provokes("llamacpp_tools")
def _(world):
    (world.folder / "llama.cpp" / "examples" / "quantize" / "README.md").read_text("utf-8")


CASES = [
    pytest.param(name, function, marks=getattr(function, "pytestmark", ()), id=name)
    for name, found in PROVOKED.items()
    for function in found
]


@pytest.mark.parametrize(("name", "provoke"), CASES)
def test_the_real_error_is_recognized(name, provoke, world):
    try:
        text = provoke(world)
    except (Exception, KeyboardInterrupt) as error:
        assert doctor.explain(error).name == name, error
        text = traceback.format_exc()
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        assert raised_in.is_relative_to(HELPERS) == (NAMES[name].origin == "course"), raised_in
    assert text, "nothing was raised"
    assert doctor.explain(text).name == name


def test_every_symptom_can_be_found():
    for symptom in NAMES.values():
        assert symptom.error or symptom.words, symptom.name
        assert symptom.origin in ("library", "course", "read")


def test_readme_counts_what_is_really_raised():
    kinds = Counter(symptom.origin for symptom in NAMES.values() if symptom.error)
    readme = (notebooks.root() / "README.md").read_text("utf-8")
    assert f"{kinds['library']} of {len(NAMES)} symptoms are raised by the libraries" in readme
    assert f"{kinds['course']} more are the course's own messages" in readme


# ── what a machine without a GPU cannot raise ────────────────────────────────────────────
READ = [
    (
        "torchao_optimizer",
        "ModuleNotFoundError: No module named 'torchao.prototype.low_bit_optim'",
    ),
    ("magic_unknown", "UsageError: Line magic function `%curl` not found."),
    ("device_assert", "torch.AcceleratorError: CUDA error: device-side assert triggered"),
    (
        "cuda_memory",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    ),
    (
        "scaler_bfloat16",
        'NotImplementedError: "_amp_foreach_non_finite_check_and_unscale_cuda" not '
        "implemented for 'BFloat16'",
    ),
    (
        "numpy_binary",
        "ValueError: numpy.dtype size changed, may indicate binary incompatibility",
    ),
    ("flash_float32", "RuntimeError: FlashAttention only support fp16 and bf16 data type"),
    (
        "flash_build",
        "ImportError: /venv/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined "
        "symbol: _ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_string",
    ),
    (
        "bf16_kernel",
        "RuntimeError: Internal Triton PTX codegen error:\n"
        "ptxas /tmp/compile-ptx-src, line 77; error   : Feature 'cvt with .f32.bf16' "
        "requires .target sm_80 or higher",
    ),
    (
        "duplicate_gpu",
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1691, "
        "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.19.3\n"
        "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
        "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
    ),
    (
        "no_kernel_image",
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on "
        "the device",
    ),
    (
        "eval_memory",
        'File "/venv/transformers/trainer.py", line 2988, in evaluation_loop\n'
        "    losses, logits, labels = self.prediction_step(\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.00 GiB.",
    ),
    (
        "llamacpp_moved",
        "docker: Error response from daemon: manifest for ghcr.io/ggerganov/llama.cpp:full not "
        "found: manifest unknown",
    ),
    (
        "autotrain_option",
        "AutoTrain advanced CLI: error: unrecognized arguments: --use_peft --use_int4",
    ),
    (
        "ollama_context",
        'level=WARN source=runner.go:129 msg="truncating input prompt" limit=2048 prompt=3940',
    ),
]


@pytest.mark.parametrize(("name", "text"), READ)
def test_messages_that_were_only_read_are_recognized(name, text):
    assert NAMES[name].origin == "read"
    assert doctor.explain(text).name == name
    ranked = "".join(f"[rank0]: {line}\n" for line in ["Traceback", *text.splitlines()])
    assert doctor.explain(ranked).name == name, "as torchrun's processes write it"


# Longer messages, of which more than one entry knows a part; and what only texts hold.
MORE = [
    (
        "two_devices",
        "RuntimeError: Expected all tensors to be on the same device, but got index is on "
        "cpu, different from other tensors on cuda:0 (when checking argument in method "
        "wrapper_CUDA__index_select)",
    ),
    ("flash_attention", "RuntimeError: FlashAttention only supports Ampere GPUs or newer."),
    (
        "no_kernel_image",
        "UserWarning: NVIDIA GeForce RTX 5090 with CUDA capability sm_120 is not compatible "
        "with the current PyTorch installation.",
    ),
    (
        "ollama_context",
        "Error: the prompt is longer than the context length currently available to the model",
    ),
    (
        "cuda_memory",
        'File "/venv/transformers/trainer.py", line 3, in training_step\n'
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.00 GiB.",
    ),
    (
        "flash_attention",
        "ImportError: FlashAttention2 has been toggled on, but it cannot be used due to "
        "the following error: FlashAttention2 is not available on CPU.",
    ),
    (
        "flash_attention",
        "ValueError: You are attempting to use Flash Attention 2 with a model not "
        "initialized on GPU and with no GPU available.",
    ),
    (
        "killed",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
        "train.py FAILED\n  exitcode  : -9 (pid: 4242)\n"
        "  traceback : Signal 9 (SIGKILL) received by PID 4242",
    ),
    ("huggingface_cli", "bash: line 1: huggingface-cli: command not found"),
    ("huggingface_cli", "zsh: command not found: huggingface-cli"),
    (
        "huggingface_cli",
        "FileNotFoundError: [Errno 2] No such file or directory: 'huggingface-cli'",
    ),
    (
        "huggingface_cli",
        "Warning: `huggingface-cli` is deprecated and no longer works. Use `hf` instead.",
    ),
    (
        "huggingface_cli",
        "'huggingface-cli' is not recognized as an internal or external command",
    ),
    (
        "makefile",
        "Makefile:2: *** The Makefile build is deprecated. Use the CMake build instead. For "
        "more details, see docs/build.md.  Stop.",
    ),
    ("build_option", "CMake Warning at CMakeLists.txt:95: LLAMA_CUDA is deprecated and will be"),
    ("ggml_file", "gguf_init_from_file: invalid magic characters: 'tjgg', expected 'GGUF'"),
    ("damaged_gguf", "gguf_init_from_file: invalid magic characters: '<!do', expected 'GGUF'"),
    (
        "killed",
        "helpers.course.notebooks.NotebookError: Chapter5.ipynb, code cell 12: the kernel died",
    ),
]


@pytest.mark.parametrize(("name", "text"), MORE)
def test_another_wording_is_recognized_too(name, text):
    assert doctor.explain(text).name == name


BARE = [
    (
        "two_devices",
        "Expected all tensors to be on the same device, but found at least two",
    ),
    ("two_devices", "why are my tensors on cuda:0 and cpu?"),
    (
        "data_parallel",
        "SFTTrainer does not support `nn.DataParallel`, which `Trainer` uses",
    ),
    ("flash_float32", "FlashAttention only support fp16 and bf16 data type"),
    ("flash_build", "flash_attn_2_cuda.cpython-311.so: undefined symbol: _ZN3c104cuda"),
    ("duplicate_gpu", "NCCL WARN Duplicate GPU detected : rank 1 and rank 0 both on CUDA"),
    (
        "no_kernel_image",
        "CUDA error: no kernel image is available for execution on the device",
    ),
    ("bitsandbytes_library", "CUDA SETUP ERROR: Missing dependency: libnvJitLink.so.13"),
    (
        "bitsandbytes_build",
        "bitsandbytes native library functionality but it's not available.",
    ),
    ("bf16_kernel", "Feature '.bf16' requires .target sm_80 or higher"),
    ("illegal_instruction", "llama-server was killed by SIGILL"),
    ("illegal_instruction", "Illegal instruction (core dumped)"),
    ("llamacpp_crash", "llama-perplexity was killed by SIGBUS"),
    ("killed", "llama-server was killed by SIGKILL"),
    ("killed", "Kernel died"),
    ("killed", "my session crashed after using all available RAM"),
    ("killed", "the kernel keeps crashing"),
    ("cuda_memory", "CUDA out of memory"),
    (
        "hub_unreachable",
        "We couldn't connect to 'https://huggingface.co' to load the files",
    ),
]


@pytest.mark.parametrize(("name", "text"), BARE)
def test_a_message_without_its_exception_is_recognized(name, text):
    assert doctor.explain(text).name == name


WORDS = [
    ("endless", "the model never stops talking"),
    ("endless", "it repeats the same sentence on and on"),
    ("loss_nan", "my loss is nan from the first step"),
    ("loss_nan", "training says loss = 0.0"),
    ("frozen_adapter", "the loss does not go down"),
    ("frozen_adapter", "after training it answers exactly as before"),
    ("asks_questions", "it writes the question as well"),
    ("bf16_on_t4", "on a T4 it is terribly slow"),
    ("garbage_when_served", "fine in the notebook, but garbage in Ollama"),
    ("diverges", "my loss explodes after 100 steps"),
    ("diverges", "there is a spike in the loss"),
    ("overfits", "why does my model overfit?"),
    ("overfits", "the validation loss goes up while the training loss falls"),
    ("forgets", "it has forgotten everything else"),
    ("forgets", "after fine-tuning it is worse at everything else"),
    ("slow_on_cpu", "it uses the CPU instead of the GPU"),
    ("slow_on_cpu", "so slow on the CPU, my card is idle"),
    ("session_lost", "Colab disconnected and my training is gone"),
    ("nan_float16", "on a T4 the loss is nan"),
    ("nan_float16", "nan with fp16=True"),
    ("eval_memory", "out of memory during evaluation"),
    ("int8_checkpointing", "8-bit with gradient checkpointing saves too little"),
    ("packing_leaks", "do packed samples see each other?"),
    ("formatter_ignored", "my formatting_func is ignored"),
    ("strings", "my prompt and completion are strings"),
    ("ollama_context", "Ollama forgets the beginning of the talk"),
    ("ollama_adapter", "my Modelfile has an ADAPTER line"),
    ("ollama_address", "curl https://ollama.ai/install.sh does nothing"),
    ("llamacpp_moved", "is ggerganov still the place to clone from?"),
    ("repository_moved", "where is TimDettmers/bitsandbytes?"),
]


@pytest.mark.parametrize(("name", "text"), WORDS)
def test_a_readers_own_words(name, text):
    assert doctor.explain(text).name == name
    assert NAMES[name].words


def test_a_formatter_beside_other_columns_is_ignored_and_the_cure_helps(world):
    def text(rows):
        trainer = world.trainer(train_dataset=rows, formatting_func=lambda row: "Ours")
        return world.tokenizer.decode(trainer.train_dataset[0]["input_ids"])

    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = questions().add_column("messages", [talk, talk])
    assert "Ours" not in text(rows) and "Ho" in text(rows)
    assert "Ours" in text(rows.remove_columns("messages"))


# ── what it does not know ────────────────────────────────────────────────────────────────
def unrelated():
    yield lambda: 1 / 0
    yield lambda: {}["tex"]
    yield lambda: [][3]
    yield lambda: int("seven")
    yield lambda: None.loss
    yield lambda: os.listdir("no-such-folder")
    yield lambda: __import__("no_such_module_anywhere")
    yield lambda: "a" + 1
    yield lambda: print(undefined_name)  # noqa: F821
    yield lambda: torch.zeros(2) + torch.zeros(3)
    yield lambda: torch.randn(2, 3) @ torch.randn(2, 3)
    yield lambda: next(iter([]))
    yield lambda: (lambda tokens: tokens)(tokenizer=1)
    yield lambda: assert_false()


def assert_false():
    raise AssertionError("expected 3 tokens")


@pytest.mark.parametrize(
    "text",
    [
        "what is the difference between cuda and cpu?",
        "how do I restart the kernel?",
        "which devices do you support?",
        "can I use two GPUs?",
        "what is overfitting?",
        "how many epochs until the loss is good?",
        "can I run this on a CPU?",
        "training is slow",
        "what does a checkpoint hold?",
        "IndexError: string index out of range",
        "bitsandbytes is slow",
        "flash attention",
        "RuntimeError: CUDA error: invalid argument",
        "RuntimeError: llama-server ended with status 1",
        "bash: ./run: No such file or directory",
        "python: can't open file '/content/train.py': [Errno 2] No such file or directory",
        "train.py: error: unrecognized arguments: --fast",
        "how do I merge an adapter?",
        "ImportError: libfoo.so.3: cannot open shared object file",
    ],
)
def test_what_only_sounds_alike_is_unknown(text):
    assert doctor.explain(text).name == "unknown"


@pytest.mark.parametrize("fail", list(unrelated()))
def test_an_unrelated_error_is_unknown_and_gets_a_next_step(fail):
    with pytest.raises(Exception) as caught:
        fail()
    found = doctor.explain(caught.value)
    assert found is doctor.UNKNOWN and found.name == "unknown" and found.proof is None
    assert "doctor.report()" in found.cure
    text = "".join(traceback.format_exception(caught.value))
    assert doctor.explain(text).name == "unknown"


def test_the_cause_behind_an_error_counts_too():
    try:
        try:
            torch.nn.Linear(4, 4).bfloat16()(torch.randn(1, 4))
        except RuntimeError as error:
            raise ValueError("training failed") from error
    except ValueError as error:
        assert doctor.explain(error).name == "mixed_dtypes"
        assert doctor.explain(traceback.format_exc()).name == "mixed_dtypes"


def test_the_last_exception_is_taken_when_none_is_given(monkeypatch):
    monkeypatch.setattr(sys, "last_value", OSError(28, "No space left on device"), False)
    assert doctor.explain().name == "disk_full"
    monkeypatch.delattr(sys, "last_value")
    with pytest.raises(ValueError, match="there has been none"):
        doctor.explain()
    with pytest.raises(TypeError, match="an exception or a text, not int"):
        doctor.explain(3)


def test_an_explanation_shows_itself():
    found = doctor.explain("the model never stops")
    assert "pad = eos" in str(found) and "Chapter4.ipynb" in str(found)
    assert "<table>" in found._repr_html_()
    assert "<script>" not in doctor.explain("ValueError: <script>")._repr_html_()


# ── the machine ──────────────────────────────────────────────────────────────────────────
@pytest.fixture
def any_machine(monkeypatch):
    """What this machine has or lacks must not decide: a full disk, an own llama.cpp."""
    usage = shutil.disk_usage(os.curdir)._replace(free=50 * doctor.GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.delenv(llamacpp.VARIABLE, raising=False)
    monkeypatch.setattr(llamacpp, "trouble", lambda: None)


def test_the_report_of_this_machine(any_machine):
    found = doctor.report()
    assert not found.failed, str(found)
    abouts = [finding.about for finding in found.findings]
    assert abouts[:3] == ["Python", "packages", "accelerator"]
    assert re.match(r"\[OK\]\s+Python\s+3\.", str(found))


def test_a_look_that_fails_is_a_line_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(places, "missing", lambda **_: ["trl==9"])
    monkeypatch.setitem(doctor.LOOKS, "disk", lambda: 1 / 0)
    found = doctor.report()
    assert found.failed
    assert "missing or too old: trl==9" in str(found)
    assert "ZeroDivisionError" in str(found) and "[WARN]" in str(found)


def test_a_full_disk_fails_and_an_empty_one_does_not(monkeypatch):
    for free, level in ((1, doctor.FAIL), (5, doctor.WARN), (50, doctor.OK)):
        usage = SimpleNamespace(free=free * doctor.GIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert doctor.LOOKS["disk"]()[0] == level


def with_cards(monkeypatch, *names, capability=(8, 0)):
    """A torch that sees these cards, of 16 GiB each."""
    cards = [SimpleNamespace(name=name, total_memory=16 * doctor.GIB) for name in names]
    for function, answer in {
        "is_available": lambda: bool(cards),
        "device_count": lambda: len(cards),
        "current_device": lambda: 0,
        "get_device_properties": lambda number=0: cards[number],
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: (
            including_emulation or capability >= (8, 0)
        ),
    }.items():
        monkeypatch.setattr(torch.cuda, function, answer)


def test_of_several_cards_the_one_that_is_used_is_named(monkeypatch):
    with_cards(monkeypatch, "L4")
    level, text = doctor.LOOKS["accelerator"]()
    assert (level, "L4, 16.0 GiB" in text) == (doctor.OK, True)
    assert "CUDA_VISIBLE_DEVICES" not in text
    with_cards(monkeypatch, "Tesla T4", "Tesla P4")
    level, text = doctor.LOOKS["accelerator"]()
    assert level == doctor.WARN, "TRL refuses two"
    assert "cuda:0 Tesla T4, 16.0 GiB; cuda:1 Tesla P4" in text
    assert "Used is cuda:0" in text and "CUDA_VISIBLE_DEVICES=0" in text


def test_the_data_type_comes_with_its_reason(monkeypatch):
    monkeypatch.delenv("HELPERS_DTYPE", raising=False)
    with_cards(monkeypatch)
    monkeypatch.setattr(runtime, "native_dtype", lambda device: torch.float32)
    monkeypatch.setattr(runtime, "native_dtype_reason", lambda device: f"as on a {device}")
    assert doctor.LOOKS["data types"]() == (doctor.OK, "float32 (as on a cpu)")
    monkeypatch.undo()
    monkeypatch.delenv("HELPERS_DTYPE", raising=False)
    with_cards(monkeypatch, "L4")
    assert doctor.LOOKS["data types"]() == (doctor.OK, "bfloat16 (native on this card)")
    with_cards(monkeypatch, "Tesla T4", capability=(7, 5))
    level, text = doctor.LOOKS["data types"]()
    assert level == doctor.WARN and text.startswith("float16 (") and "fp16=True" in text


@pytest.fixture
def flash_attn(monkeypatch):
    """Put a flash_attn of one line of code on the path."""

    def install(folder, code):
        (folder / "flash_attn.py").write_text(code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "flash_attn", raising=False)

    yield install
    sys.modules.pop("flash_attn", None)


def test_a_flash_attention_that_cannot_work_here_is_a_warning(monkeypatch, tmp_path, flash_attn):
    with_cards(monkeypatch)
    assert doctor.LOOKS["attention"]()[0] == doctor.OK, "not installed, not missed"
    flash_attn(tmp_path, "")
    level, text = doctor.LOOKS["attention"]()
    assert level == doctor.WARN and "needs a CUDA card" in text and "uninstall" in text
    with_cards(monkeypatch, "Tesla T4", capability=(7, 5))
    level, text = doctor.LOOKS["attention"]()
    assert level == doctor.WARN and "7.5" in text
    with_cards(monkeypatch, "L4")
    level, text = doctor.LOOKS["attention"]()
    assert level == doctor.OK and "16-bit" in text and "flash_attention_2" in text
    flash_attn(tmp_path, "raise ImportError('undefined symbol: _ZN3c10')")
    level, text = doctor.LOOKS["attention"]()
    assert level == doctor.WARN and "undefined symbol: _ZN3c10" in text


def test_memory_is_what_this_process_may_still_take(monkeypatch):
    monkeypatch.setattr(runtime, "memory_bytes", lambda device: 12 * doctor.GIB)
    for free, level in ((3, doctor.WARN), (9, doctor.OK)):
        monkeypatch.setattr(runtime, "available_memory_bytes", lambda free=free: free * doctor.GIB)
        found, text = doctor.LOOKS["memory"]()
        assert found == level and f"{free}.0 of 12.0 GiB" in text


def test_a_llama_cpp_that_needs_help_says_so(monkeypatch):
    monkeypatch.setattr(llamacpp, "find", lambda name: "llama-server")
    monkeypatch.setattr(llamacpp, "version", lambda program: "version: 9999 (abc)")
    monkeypatch.setattr(llamacpp, "trouble", lambda: None)
    assert doctor.LOOKS["llama.cpp"]() == (doctor.OK, "version: 9999 (abc)")
    monkeypatch.setattr(llamacpp, "trouble", lambda: "started with --no-repack.")
    level, text = doctor.LOOKS["llama.cpp"]()
    assert level == doctor.WARN and "9999" in text and "--no-repack" in text


def test_packages_that_only_a_part_of_the_course_needs_are_a_warning(monkeypatch):
    """Installed without extras, everything imports: that is not broken."""
    monkeypatch.setattr(places, "EXTRAS", ("notebook", "serve"))
    monkeypatch.setattr(
        places, "missing", lambda extras=places.EXTRAS: ["gguf>=0.17"] if extras else []
    )
    level, text = doctor.LOOKS["packages"]()
    assert level == doctor.WARN and "gguf>=0.17" in text
    assert "pip install 'fine-tuning-helpers[notebook,serve]'" in text


def test_other_versions_than_the_tested_ones_are_a_warning(monkeypatch):
    torch_here = runtime.package_version("torch").split("+")[0]
    tested = places.tested_versions() | {"trl": "0.12.0", "torch": torch_here}
    monkeypatch.setattr(places, "tested_versions", lambda folder=None: tested)
    level, text = doctor.LOOKS["packages"]()
    assert level == doctor.WARN and "(tested: 0.12.0)" in text
    assert "torch" not in text, "the build's name after the plus does not count"


def test_the_command(monkeypatch, capsys, any_machine):
    from helpers.__main__ import main

    assert main(["doctor", "RuntimeError: size mismatch for lora_A"]) == 0
    assert "another base" in capsys.readouterr().out
    monkeypatch.setattr(runtime, "hub_reachable", lambda: False)
    assert main(["doctor"]) == 0
    assert "[OK]    Python" in capsys.readouterr().out


# ── the page ─────────────────────────────────────────────────────────────────────────────
def test_the_page_is_in_step():
    text = (notebooks.root() / house.PAGE).read_text(encoding="utf-8")
    assert text == house.troubleshooting(), "run: python tests/house.py sync"


@cache
def headings(notebook):
    cells = nbformat.read(notebooks.root() / f"{notebook}.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return [re.sub(r"[*`]", "", line.lstrip("# ")) for line in text.splitlines() if line[:1] == "#"]


@pytest.mark.parametrize("name", [name for name in NAMES if NAMES[name].proof])
def test_the_proof_is_a_heading_of_its_notebook(name):
    notebook, heading = NAMES[name].proof
    assert heading in headings(notebook)
