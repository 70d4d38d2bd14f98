"""llama.cpp's programs, options and scripts of its first years, and what they are now.

Tests hold these tables against its source.
"""

import re

from helpers.course.check._lines import names

# Programs of its first two years and what they are called now; '' where they have gone.
PROGRAMS = {"main": "llama-cli", "llava-cli": "llama-mtmd-cli", "infill": ""}
PROGRAMS |= {"train-text-from-scratch": ""}
PROGRAMS |= {
    old: f"llama-{old}"
    for old in names(
        "server quantize perplexity imatrix embedding export-lora finetune gguf-split "
        "batched batched-bench speculative simple tokenize"
    )
}
# Options that none of them takes any more, and those that one has and another has not.
OPTIONS = names(
    "-eps --rms-norm-eps -gqa --gqa -ins --instruct -cml --chatml --mlock --no-mmap "
    "--memory-f32 -nommq --no-mul-mat-q --mul-mat-q --lora-base --no-penalize-nl "
    "--penalize-nl --mtest --low-vram --tfs"
)
OPTIONS_OF_OTHERS = {
    "llama-cli": names(
        "-i --interactive -if --interactive-first -cnv -no-cnv --conversation "
        "--no-conversation --in-prefix --in-suffix --prompt-cache"
    )
}
NEEDS_VALUE = ("-fa", "--flash-attn", "--color")  # were switches; take on, off or auto now
# Options of CMake: the build stops, warns, or does not look at them at all.
BUILD_OPTIONS = {
    "fails": names("LLAMA_CUBLAS"),
    "warns": names("LLAMA_CUDA LLAMA_METAL LLAMA_NATIVE LLAMA_RPC LLAMA_SYCL LLAMA_CURL"),
    "silent": names("LLAMA_BLAS LLAMA_OPENBLAS LLAMA_HIPBLAS LLAMA_CLBLAST LLAMA_VULKAN"),
}
SCRIPT = re.compile(r"convert-(?!.*encoder)[\w-]*\.py|convert_lora_to_ggml\.py")
SCRIPT_REQUIREMENTS = re.compile(r"requirements-(convert-[\w-]*|hf-to-gguf)\.txt")
SCRIPT_OPTIONS = names(
    "--vocab-type --vocabtype --vocab-dir --ctx --pad-vocab --padvocab --concurrency "
    "--skip-unknown --awq-path --dump --big-endian"
)
OUTTYPES = names("f32 f16 bf16 q8_0 tq1_0 tq2_0 auto")
TOOLS = names(
    "main server quantize perplexity imatrix export-lora gguf-split llava llama-bench "
    "batched-bench tokenize rpc cvector-generator tts"
)
# Options of `autotrain llm` in its first year that its last release (0.8.36) does not take.
AUTOTRAIN_OPTIONS = names(
    "--use_peft --use_int4 --use_int8 --fp16 --use_fp16 --learning_rate --num_train_epochs "
    "--train_batch_size --evaluation_strategy --repo_id --gradient_accumulation_steps "
    "--use_flash_attention_2"
)
