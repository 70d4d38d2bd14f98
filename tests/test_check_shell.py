"""Old command lines: what is named, what is left alone, and what the claims rest on."""

import re
from importlib import metadata

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.course import check, doctor, notebooks
from helpers.course.check import _llamacpp, _packages, _shell, _source
from helpers.serving import llamacpp

HUB, COMPILE = ("fails", "huggingface_cli"), ("fails", "makefile")
MOVED, PROGRAM = ("moved", "llamacpp_moved"), ("fails", "llamacpp_program")
SCRIPT, CONVERTER = ("fails", "llamacpp_script"), ("fails", "converter_option")
OPTION, BUILD = ("fails", "llamacpp_option"), ("fails", "build_option")
TRL, TRL_SCRIPT = ("fails", "trl_option"), ("moved", "trl_script")

OLD = [
    # the Hub and its command
    ("huggingface-cli login --token $HUGGINGFACE_TOKEN", [HUB]),
    ("huggingface-cli download TheBloke/Mistral-7B-GGUF m.Q4_K_M.gguf --local-dir .", [HUB]),
    ("pip install -q huggingface_hub && huggingface-cli whoami", [HUB]),
    ("HF_HUB_ENABLE_HF_TRANSFER=1 huggingface-cli upload me/yoda .", [HUB]),
    ("sudo -E true; bash -c 'huggingface-cli login'", [HUB]),
    ("transformers-cli login", [("fails", "transformers_cli")]),
    # building llama.cpp
    ("make -C llama.cpp", [COMPILE]),
    ("cd llama.cpp && make", [COMPILE]),
    ("cd /content/llama.cpp && make clean && LLAMA_CUBLAS=1 make -j$(nproc)", [COMPILE]),
    ("LLAMA_CUBLAS=1 make", [COMPILE]),
    ("make LLAMA_CUDA=1 -j8", [COMPILE]),
    ("make GGML_CUDA=1 llama-quantize", [COMPILE]),
    ("make quantize", [COMPILE]),
    ("(cd ./llama.cpp; make -j)", [COMPILE]),
    ("git clone https://github.com/ggerganov/llama.cpp", [MOVED]),
    (
        "git clone --depth=1 git@github.com:ggerganov/llama.cpp.git && cd llama.cpp && make",
        [MOVED, COMPILE],
    ),
    ("wget https://raw.githubusercontent.com/ggerganov/llama.cpp/master/convert.py", [MOVED]),
    ("cmake -B build -DLLAMA_CUBLAS=ON", [BUILD]),
    ("mkdir -p build && cd build && cmake .. -DLLAMA_CUBLAS=on", [BUILD]),
    ("cmake -B build -DLLAMA_CUDA=ON", [("warns", "build_option")]),
    ("cmake -B build -DLLAMA_BLAS=ON -DLLAMA_HIPBLAS=1", [("silent", "build_option")] * 2),
    ('CMAKE_ARGS="-DLLAMA_CUBLAS=on" FORCE_CMAKE=1 pip install llama-cpp-python', [BUILD]),
    ("export CMAKE_ARGS='-DLLAMA_CUBLAS=on' && pip install 'llama-cpp-python[server]'", [BUILD]),
    ("env CMAKE_ARGS=-DLLAMA_CUBLAS=on python -m pip install llama_cpp_python", [BUILD]),
    # its programs
    ("./llama.cpp/quantize model.gguf model-q4.gguf q4_k_m", [PROGRAM]),
    ("./quantize ./models/7B/ggml-model-f16.gguf ./out.gguf Q4_0", [PROGRAM]),
    ("cd llama.cpp && ./main -m ../model.gguf -p 'Hi' -n 64", [PROGRAM]),
    ("/content/llama.cpp/build/bin/main -m model.gguf", [PROGRAM]),
    ("{llama_cpp}/quantize {base}.gguf {base}-q4_k_m.gguf q4_k_m", [PROGRAM]),
    ("./server -m m.gguf --host 0.0.0.0 &", [PROGRAM]),
    ("nohup ./llama.cpp/server -m m.bin -c 2048 > log 2>&1 &", [PROGRAM]),
    ("for q in q4_0 q8_0; do ./llama.cpp/quantize a.gguf $q.gguf $q; done", [PROGRAM]),
    ("./llama.cpp/perplexity -m m.gguf -f wiki.txt", [PROGRAM]),
    ("./main -m m.gguf --color -c 2048 --temp 0.7 -ins -eps 1e-5", [PROGRAM, *[OPTION] * 3]),
    ("./llama.cpp/main -m a.ggmlv3.q4_0.bin -p x", [PROGRAM, ("fails", "ggml_file")]),
    ("python -m llama_cpp.server --model a.ggmlv3.q4_0.bin", [("fails", "ggml_file")]),
    ("./build/bin/llama-cli -m m.gguf -p 'Once' -no-cnv", [OPTION]),
    ("llama-server -m m.gguf --mlock --no_mmap", [OPTION] * 2),
    ("llama-server -m m.gguf -fa -c 4096", [OPTION]),
    ("llama-cli -m m.gguf --color", [OPTION]),
    # its converters
    ("python llama.cpp/convert.py ./merged --outtype f16 --outfile m.gguf", [SCRIPT]),
    ("python3 convert.py models/7B --vocab-type bpe", [SCRIPT]),
    ("./llama.cpp/convert.py merged", [SCRIPT]),
    ("python llama.cpp/convert-hf-to-gguf.py merged --outfile m.gguf", [SCRIPT]),
    ("{sys.executable} llama.cpp/convert-lora-to-ggml.py adapter", [SCRIPT]),
    ("python llama.cpp/convert-llama-ggml-to-gguf.py --input a.bin", [SCRIPT]),
    ("python gguf-py/scripts/gguf-dump.py m.gguf", [SCRIPT]),
    ("pip install -r llama.cpp/requirements/requirements-convert-hf-to-gguf.txt", [SCRIPT]),
    ("python llama.cpp/convert_hf_to_gguf.py m --outtype q4_k_m", [CONVERTER]),
    ("python llama.cpp/convert_hf_to_gguf.py m --vocab-type bpe --ctx 4096", [CONVERTER] * 2),
    ("cat llama.cpp/examples/server/README.md", [("moved", "llamacpp_tools")]),
    ("docker run -v m:/models ghcr.io/ggerganov/llama.cpp:full --convert /models", [MOVED]),
    ("docker pull ghcr.io/ggerganov/llama.cpp:server-cuda", [MOVED]),
    # Ollama
    ("curl https://ollama.ai/install.sh | sh", [("moved", "ollama_address")]),
    ("curl -fsSL https://www.ollama.ai/install.sh | sh", [("moved", "ollama_address")]),
    ("echo 'ADAPTER ./ggml-adapter.bin' >> Modelfile", [("fails", "ollama_adapter")]),
    (r'printf "FROM phi3:mini\nADAPTER ./a.gguf\n" > Modelfile', [("fails", "ollama_adapter")]),
    ("ADAPTER ./adapter.gguf", [("fails", "ollama_adapter")]),  # inside of a here-document
    # TRL, accelerate, transformers
    ("trl sft --model_name_or_path gpt2 --dataset_name imdb --max_seq_length 512", [TRL]),
    ("trl sft --model_name gpt2 --torch_dtype=bfloat16 --evaluation_strategy no", [TRL] * 2),
    ("trl sft --model_name gpt2 --max-seq-length 512", [TRL]),
    ("trl dpo --model_name gpt2 --dataset_name d --overwrite_output_dir", [TRL]),
    ("trl chat --model_name_or_path gpt2", [("fails", "trl_command")]),
    ("python -m trl.scripts.sft --max_seq_length 9", [TRL]),
    ("accelerate launch --num_processes 2 trl/scripts/sft.py --torch_dtype auto", [TRL]),
    ("python trl/examples/scripts/sft.py --model_name gpt2 --load_in_4bit", [TRL_SCRIPT]),
    ("accelerate launch --multi_gpu examples/scripts/dpo.py --beta 0.1", [TRL_SCRIPT]),
    ("accelerate launch --fp16 train.py --lr 1", [("fails", "launch_option")]),
    (
        "python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir llama",
        [("fails", "module_gone")],
    ),
    (
        "autotrain llm --train --model m --data-path d --use-peft --use_int4 --lr 2e-4",
        [("fails", "autotrain_option")] * 2,
    ),
    # pip
    ("pip install -q flash-attn", [("fails", "flash_pip")]),
    ("pip install -U 'flash_attn>=2' packaging", [("fails", "flash_pip")]),
    (
        "pip install -q git+https://github.com/TimDettmers/bitsandbytes.git",
        [("moved", "repository_moved")],
    ),
    ("git clone https://github.com/lvwerra/trl.git", [("moved", "repository_moved")]),
]


@pytest.mark.parametrize(("line", "wanted"), OLD, ids=[line for line, _ in OLD])
def test_an_old_line_is_named(line, wanted):
    found = list(_shell.hits(line))
    assert [(kind, symptom) for kind, symptom, _ in found] == wanted
    for kind, symptom, word in found:
        assert kind in check.KINDS and symptom in doctor.SYMPTOMS
        assert word.split("/")[-1].split()[-1] in line.replace("flash_attn", "flash-attn"), word


SOUND = [
    "hf auth login",
    "hf download HuggingFaceTB/SmolLM2-135M --local-dir model",
    "pip install -q trl",
    "pip install -U huggingface_hub transformers",
    "pip install flash-attn --no-build-isolation",
    "conda install -c conda-forge flash-attn",
    "pip install https://x.org/flash_attn-2.8.3+cu12torch2.8-cp312-cp312-linux_x86_64.whl",
    "pip install git+https://github.com/huggingface/transformers",
    "pip install git+https://github.com/bitsandbytes-foundation/bitsandbytes.git",
    "pip install llama-cpp-python",
    "CMAKE_ARGS='-DGGML_CUDA=on' pip install llama-cpp-python",
    "CMAKE_ARGS='-DLLAMA_CUBLAS=on' pip install llama-cpp-python==0.2.27",
    "pip install 'unsloth[colab-new] @ git+https://github.com/unslothai/unsloth.git'",
    "git clone https://github.com/ggml-org/llama.cpp && cd llama.cpp && cmake -B build",
    "cmake --build build --config Release -j 8 --target llama-quantize",
    "cmake -S llama.cpp -B build -DGGML_CUDA=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF",
    "cd llama.cpp && mkdir build && cd build && cmake .. && make -j4",
    "cd llama.cpp && cmake . && make",
    "./llama.cpp/build/bin/llama-quantize m.gguf m-Q4_K_M.gguf Q4_K_M",
    "cd llama.cpp/build/bin && ./llama-cli -m /m.gguf -p Hello --color on -fa auto",
    "./build/bin/llama-completion -m m.gguf -p 'Once upon' -no-cnv -i",
    "./llama.cpp/llama-quantize m.gguf o.gguf q8_0",  # copied there, for all that is known
    "llama-server -m m.gguf -c 4096 --port 8080 --flash-attn on --load-mode mlock",
    "brew install llama.cpp && llama-server -hf ggml-org/gemma-3-1b-it-GGUF",
    "python llama.cpp/convert_hf_to_gguf.py merged --outfile m.gguf --outtype q8_0",
    "python llama.cpp/convert_hf_to_gguf.py $model --outtype {kind} --outfile $out",
    "python llama.cpp/convert_lora_to_gguf.py adapter --base model",
    "docker run -p 127.0.0.1:8080:8080 ghcr.io/ggml-org/llama.cpp:server -m /m.gguf",
    "docker run -i --rm ghcr.io/ggml-org/llama.cpp:full --quantize /m/a.gguf /m/b.gguf Q4_0",
    "curl -fsSL https://ollama.com/install.sh | sh",
    "ollama create yoda -f Modelfile && ollama run yoda 'What is an ADAPTER good for?'",
    r'printf "FROM ./yoda.gguf\nPARAMETER temperature 0\n" > Modelfile',
    "echo 'the ADAPTER is merged'",
    "trl sft --model_name_or_path gpt2 --dataset_name d --max_length 512 --dtype bfloat16",
    "trl sft --model_name gpt2 --use_peft --lora_r 8 --load_in_4bit --num_processes 2",
    "trl sft --config run.yaml --accelerate_config zero2",
    "trl env",
    "trl vllm-serve --model gpt2",
    "accelerate launch --mixed_precision bf16 --num_processes=2 train.py --max_seq_length 9",
    "accelerate launch -m axolotl.cli.train run.yaml --fp16",
    "accelerate config default",
    "python -m transformers.cli.transformers env",
    "python -m trl.scripts.sft --max_length 512 --model_name_or_path gpt2",
    "autotrain llm --train --model m --peft --quantization int4 --lr 2e-4",
    "make",
    "make -j8 install",
    "cd whisper.cpp && make",
    "make -C docs html",
    "./main",
    "./server --port 8080",
    "go run ./server",
    "python main.py --mlock",
    "python convert.py photos",
    "python scripts/sft.py --max_seq_length 9",  # somebody's own
    "nvidia-smi",
    "git lfs install",
    "mail me@ollama.ai.example.org",
    "ls examples/server",
    "wget -q https://huggingface.co/TheBloke/L-GGML/resolve/main/l.ggmlv3.q4_0.bin",
    "# huggingface-cli login",
    "echo done # then: make -C llama.cpp",
    "",
    "   ",
]


@pytest.mark.parametrize("line", SOUND)
def test_a_line_of_today_is_left_alone(line):
    assert list(_shell.hits(line)) == []


# ── a notebook's lines in their order ────────────────────────────────────────────────────
def read(*lines):
    session = _shell.Session()
    return [[word for _, _, word in session.hits(line)] for line in lines]


def test_the_folder_that_was_entered_is_remembered():
    assert read("cd llama.cpp", "make", "cd ..", "make") == [[], ["make"], [], []]
    assert read("cd /content/llama.cpp/", "./main -p x") == [[], ["main"]]
    assert read("cd llama.cpp && ls", "make") == [[], []], "that was another shell"


def test_a_version_of_its_time_works_as_it_did():
    asked = "cd llama.cpp && git checkout b1500"
    for first in (
        asked,
        "git clone --branch b1500 https://github.com/ggml-org/llama.cpp",
        "git -C llama.cpp reset --hard 1a2b3c4d5e",
        "git clone https://github.com/somebody/llama.cpp",
        "wget https://github.com/ggml-org/llama.cpp/releases/download/b1500/llama.zip",
    ):
        assert read(first, "make -C llama.cpp", "./llama.cpp/quantize a.gguf") == [[], [], []]
    for first in (
        "git -C llama.cpp checkout master",
        "git clone -b main https://github.com/me/yoda",
        "git checkout b1500",
        "cd llama.cpp && git pull",
    ):
        assert read(first, "make -C llama.cpp") == [[], ["make"]], first


def test_where_make_put_the_programs_there_are_none_now():
    last = "./llama.cpp/llama-quantize a.gguf b.gguf q4_0"
    assert read("make -C llama.cpp", last) == [["make"], ["llama-quantize"]]
    built = "cmake -B llama.cpp/build llama.cpp && cmake --build llama.cpp/build"
    assert read(built, last) == [[], []]
    copied = "cp llama.cpp/build/bin/llama-* llama.cpp"
    assert read("make -C llama.cpp", built, copied, last)[-1] == []


# ── strings of a program ─────────────────────────────────────────────────────────────────
TEXTS = [
    ("https://github.com/ggerganov/llama.cpp.git", "llamacpp_moved"),
    ("https://ollama.ai/install.sh", "ollama_address"),
    ("FROM llama3\nADAPTER ./adapter.gguf\nPARAMETER temperature 0", "ollama_adapter"),
    ("\nADAPTER ", "ollama_adapter"),  # between the braces of an f-string
    ("huggingface-cli", "huggingface_cli"),
    ("huggingface-cli login --token ", "huggingface_cli"),
    ("git clone https://github.com/ggerganov/llama.cpp", "llamacpp_moved"),
    ("./llama.cpp/quantize", "llamacpp_program"),
    ("llama.cpp/convert.py", "llamacpp_script"),
    ("python llama.cpp/convert.py ", "llamacpp_script"),
    ("./llama.cpp/quantize a.gguf b.gguf q4_0", "llamacpp_program"),
    ("cd llama.cpp && make", "makefile"),
    ("-DLLAMA_CUBLAS=on", "build_option"),
    ("-DLLAMA_CUBLAS=on -DFORCE=1", "build_option"),
]
NO_TEXTS = [
    "Make a sandwich, then write main and server.",
    "The ADAPTER is merged.\nFROM there on it is a model.",
    "See https://github.com/ggerganov/llama.cpp for more, says the page.",
    "trl chat is gone",
    "https://github.com/ggml-org/llama.cpp",
    "llama.cpp",
    "a\nb",
    "curl -fsSL https://ollama.com/install.sh | sh",
    "FROM ./yoda.gguf\nSYSTEM You are an ADAPTER",
    "main",
    "",
]


@pytest.mark.parametrize(("text", "symptom"), TEXTS)
def test_a_string_that_is_a_command_an_address_or_a_file(text, symptom):
    assert [name for _, name, _ in _shell.in_text(text)] == [symptom]


@pytest.mark.parametrize("text", NO_TEXTS)
def test_any_other_string_is_left_alone(text):
    assert list(_shell.in_text(text)) == []


# ── packages ─────────────────────────────────────────────────────────────────────────────
INSTALLS = [
    ("pip install -q trl peft", {"trl", "peft"}),
    ("pip3 install -qU 'trl==0.7.4' \"transformers>=4.36,<5\"", {"trl", "transformers"}),
    ("{sys.executable} -m pip install accelerate[torch]", {"accelerate"}),
    ("python -m pip install -r a.txt -i https://x.org/simple rouge_score", {"rouge-score"}),
    ("pip install -qqq einops --progress-bar off", {"einops"}),
    ("pip install torch --index-url https://download.pytorch.org/whl/cu121", {"torch"}),
    ("pip install git+https://github.com/huggingface/peft.git@v0.5.0", {"peft"}),
    ("pip install -e git+https://github.com/x/y.git#egg=lm_eval&subdirectory=z", {"lm-eval"}),
    ("pip install 'xformers[a] @ git+https://github.com/x/x.git'", {"xformers"}),
    ("pip install unsloth", {"unsloth", "unsloth-zoo"}),
    ("uv pip install --system --python 3.12 datasets", {"datasets"}),
    ("uv add sklearn", {"scikit-learn"}),
    ("conda install -y -c conda-forge -n env sentencepiece=0.2", {"sentencepiece"}),
    ("pip install google-generativeai", {"google-generativeai", "google"}),
    ("pip install Pillow PyYAML scikit_learn", {"pillow", "pyyaml", "scikit-learn"}),
    ("pip install ./wheels/auto_gptq-0.7.1-cp310-linux_x86_64.whl", {"auto-gptq"}),
    ("apt-get install -y git-lfs; pip install bitsandbytes # and more", {"bitsandbytes"}),
    ("pip install {package} $name .", set()),
    ("pip list", set()),
    ("pip uninstall -y trl", set()),
    ("npm install left-pad", set()),
    ("echo pip install trl", set()),
]  # fmt: skip


@pytest.mark.parametrize(("line", "names"), INSTALLS)
def test_what_a_line_installs(line, names):
    assert _packages.installed(line) == names


@pytest.mark.parametrize(
    ("imported", "distribution"),
    [
        ("sklearn", "scikit-learn"),
        ("PIL", "pillow"),
        ("yaml", "pyyaml"),
        ("cv2", "opencv-python"),
        ("opencv-python-headless", "opencv-python"),
        ("dotenv", "python-dotenv"),
        ("rouge_score", "rouge-score"),
        ("Flash_Attn", "flash-attn"),
        ("llama_cpp", "llama-cpp-python"),
        ("zope.interface", "zope-interface"),
        ("trl", "trl"),
    ],
)
def test_an_import_has_the_name_of_its_distribution(imported, distribution):
    assert _packages.canonical(imported) == distribution
    assert _packages.canonical(distribution) == distribution


def test_a_pin_that_would_replace_what_is_installed_is_worth_knowing():
    here = metadata.version("trl")
    (note,) = _packages.notes("pip install -q trl==0.7.4 'transformers<4.40' peft")
    assert note.startswith(f"trl==0.7.4 (here {here}), transformers<4.40 (here ")
    assert "peft" not in note and "would replace" in note and "drop the pin" in note
    (note,) = _packages.notes("pip install git+https://github.com/huggingface/peft.git")
    assert note.startswith("peft from its repository (here ")
    for name in ("unsloth", "autotrain-advanced"):
        (note,) = _packages.notes(f"pip install {name}")
        assert "an environment of its own" in note
    for line in (
        "text-generation-launcher --model-id gpt2",
        "docker run ghcr.io/huggingface/text-generation-inference:3.3 --model-id gpt2",
    ):
        (note,) = _packages.notes(line)
        assert "archived" in note
    for line in (
        f"pip install trl=={here}",
        "pip install 'trl>=0.7'",
        "pip install trl torch==1.13.1",
        "pip install 'trl==nonsense'",
        "ls",
    ):
        assert _packages.notes(line) == []


# ── odd input ────────────────────────────────────────────────────────────────────────────
WORDS = ["make", "-C", "llama.cpp", "pip", "install", "trl", "sft", "python", "-m", "'", '"', "\\"]
WORDS += [
    "{x['a']}",
    "$(nproc)",
    ";",
    "&&",
    "|",
    ">",
    "-",
    "--",
    "=",
    "cd",
    "#",
    "git",
    "accelerate",
]
WORDS += ["launch", "-D", "@", "[", "(", "`", "/", "~", "bash", "-c", "\n", "autotrain", "llm"]
LINES = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=9).map(" ".join)


@settings(deadline=None, max_examples=300)
@given(LINES)
def test_nothing_raises(line):
    session = _shell.Session()
    for found in (session.hits(line), session.hits(line), _shell.in_text(line)):
        assert all(len(hit) == 3 for hit in found)
    assert isinstance(_packages.installed(line), set) and isinstance(_packages.notes(line), list)


# ── our own pages ────────────────────────────────────────────────────────────────────────
def our_lines():
    for path in sorted(notebooks.root().glob("*.ipynb")):
        for line in _source.read(path).shell:
            yield path.name, line.text
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                yield from ((path.name, line) for line in fenced(cell.source))
    for name in ("README.md", "AppendixA.md", "FAQ.md"):
        text = (notebooks.root() / name).read_text("utf-8")
        yield from ((name, line) for line in fenced(text))


def fenced(text):
    for block in re.findall(r"(?ms)^```(?:bash|sh|shell)?\n(.*?)^```", text):
        yield from re.sub(r"\\\n", " ", block).splitlines()


def test_our_own_lines_are_left_alone():
    lines = list(our_lines())
    assert len(lines) > 20 and any("cmake" in line or "pip" in line for _, line in lines)
    found = {(page, line): list(_shell.hits(line)) for page, line in lines}
    assert {place: hits for place, hits in found.items() if hits} == {}


# ── what the claims rest on ──────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def source():
    return llamacpp.source_folder()


def test_the_options_are_gone_from_llamacpp(source):
    text = (source / "common" / "arg.cpp").read_text("utf-8")
    known = set(re.findall(r'"(-[\w-]+)"', text))
    assert {"-m", "--flash-attn", "--load-mode"} <= known
    assert not known & set(_llamacpp.OPTIONS)
    for option in _llamacpp.NEEDS_VALUE:
        assert re.search(rf'"{option}"[^}}]*}}, *"\[on\|off\|auto\]"', text), option
    for program, options in _llamacpp.OPTIONS_OF_OTHERS.items():
        tools = source / "tools"
        theirs = (tools / program.removeprefix("llama-") / "README.md").read_text("utf-8")
        others = (tools / "completion" / "README.md").read_text("utf-8")
        for option in options:
            assert not re.search(rf"\| `[^`]*(?<!\S){option}[ ,`]", theirs), option
            assert re.search(rf"\| `[^`]*(?<![\w-]){option}[ ,`]", others), option


def test_the_programs_have_their_names_from_cmake(source):
    files = [*source.glob("tools/*/CMakeLists.txt"), *source.glob("examples/*/CMakeLists.txt")]
    text = "\n".join(file.read_text("utf-8") for file in files)
    targets = set(re.findall(r"(?:TARGET|add_executable\()\s*([\w-]+)", text))
    assert {today for today in _llamacpp.PROGRAMS.values() if today} <= targets
    assert not targets & _llamacpp.PROGRAMS.keys()


def test_the_options_of_the_build_are_old(source):
    text = (source / "CMakeLists.txt").read_text("utf-8")
    kinds = {name: kind for kind, name in re.findall(r"llama_option_depr\((\w+) +(\w+)", text)}
    assert {kinds[name] for name in _llamacpp.BUILD_OPTIONS["fails"]} == {"FATAL_ERROR"}
    assert {kinds[name] for name in _llamacpp.BUILD_OPTIONS["warns"]} == {"WARNING"}
    files = [*source.rglob("CMakeLists.txt"), *source.rglob("*.cmake")]
    everything = "\n".join(file.read_text("utf-8", "replace") for file in files)
    for name in _llamacpp.BUILD_OPTIONS["silent"]:
        assert not re.search(rf"\b{name}\b", everything), name


def test_the_converters_have_other_names(source):
    scripts = [path.relative_to(source).as_posix() for path in source.rglob("*.py")]
    top = [name for name in scripts if name.split("/")[-1].startswith("convert")]
    assert "convert_hf_to_gguf.py" in top and "convert_lora_to_gguf.py" in top
    assert not [name for name in top if _llamacpp.SCRIPT.fullmatch(name.split("/")[-1])]
    assert "convert.py" not in scripts
    assert not any(name.startswith("gguf-py/scripts/") for name in scripts)
    wanted = [path.name for path in (source / "requirements").iterdir()]
    assert wanted and not any(map(_llamacpp.SCRIPT_REQUIREMENTS.fullmatch, wanted))
    text = (source / "convert_hf_to_gguf.py").read_text("utf-8")
    assert str(list(_llamacpp.OUTTYPES)).replace("'", '"') in text
    assert not [name for name in _llamacpp.SCRIPT_OPTIONS if f'"{name}"' in text]


def test_the_tools_are_no_examples_any_more(source):
    assert (source / "tools" / "server").is_dir() and (source / "examples").is_dir()
    assert not [name for name in _llamacpp.TOOLS if (source / "examples" / name).exists()]


def test_the_installed_packages_have_no_such_programs():
    ours = {entry.name for entry in metadata.entry_points(group="console_scripts")}
    assert {"hf", "transformers", "trl", "accelerate"} <= ours
    assert not ours & {"huggingface-cli", "transformers-cli"}


def test_each_word_is_explained_by_the_message_that_it_raises():
    """What `check` says of a line and what `doctor.explain` says of its error are one entry."""
    for line, message in (
        (
            "trl sft --max_seq_length 9",
            "Accelerate launch command: error: unrecognized arguments: ",
        ),
        ("make -C llama.cpp", "Makefile:6: *** Build system changed:"),
        ("huggingface-cli login", "sh: 1: huggingface-cli: not found"),
        ("./llama.cpp/quantize a.gguf", "sh: 1: ./llama.cpp/quantize: not found"),
        ("cmake -DLLAMA_CUBLAS=ON ..", "LLAMA_CUBLAS is deprecated, use GGML_CUDA instead"),
    ):
        ((_, symptom, _),) = _shell.hits(line)
        assert doctor.explain(message).name == symptom
