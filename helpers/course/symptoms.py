"""What goes wrong in fine-tuning, why, and what helps: one list for people and programs.

`doctor.explain` searches it, and Troubleshooting.md is written from it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Symptom:
    """One thing that goes wrong.

    name: short and unique. title: what you see. cause, cure: plain sentences.
    error: a regular expression for the error's type and message ('' where none is raised).
    words: a regular expression for a reader's own description.
    proof: (notebook, heading) of the place that shows it, or None.
    provoked: a test raises the real thing; False where a CPU cannot (then the message was
    read in the library's source or in its users' reports).
    own: the message is this course's, not a library's.
    """

    name: str
    title: str
    cause: str
    cure: str
    error: str = ""
    words: str = ""
    proof: tuple[str, str] | None = None
    provoked: bool = True
    own: bool = False


def _unexpected(owner, *names):
    return rf"{owner}\.__init__\(\) got an unexpected keyword argument '({'|'.join(names)})'"


_SETTINGS = "(SFTConfig|TrainingArguments)"
_TRAINER = "(SFTTrainer|Trainer)"

SECTIONS = {
    "Calls that were renamed or have gone": [
        Symptom(
            "trainer_tokenizer",
            "`SFTTrainer(tokenizer=…)` is refused",
            "The keyword was renamed when trainers learned to take image processors too.",
            "Write `processing_class=tokenizer`.",
            _unexpected(_TRAINER, "tokenizer"),
            proof=("Chapter0", "Where the printed book differs"),
        ),
        Symptom(
            "max_seq_length",
            "`max_seq_length` is refused",
            "TRL calls it `max_length` now, and it belongs to `SFTConfig`.",
            "Write `SFTConfig(max_length=…)`. Longer rows are cut: look at your lengths first.",
            _unexpected(".*", "max_seq_length"),
            proof=("Chapter4", "6. Answers cut off in training"),
        ),
        Symptom(
            "evaluation_strategy",
            "`evaluation_strategy` is refused",
            "transformers shortened the name.",
            "Write `eval_strategy`.",
            _unexpected(_SETTINGS, "evaluation_strategy"),
            proof=("Chapter5", "Where the printed book differs"),
        ),
        Symptom(
            "group_by_length",
            "`group_by_length` is refused",
            "It became one choice of several.",
            'Write `train_sampling_strategy="group_by_length"`.',
            _unexpected(_SETTINGS, "group_by_length"),
            proof=("Chapter0", "5. The choices, in four groups"),
        ),
        Symptom(
            "overwrite_output_dir",
            "`overwrite_output_dir` is refused",
            "The argument was removed: training starts anew unless you resume on purpose.",
            "Leave it out; `trainer.train(resume_from_checkpoint=True)` resumes.",
            _unexpected(_SETTINGS, "overwrite_output_dir"),
            proof=("Chapter5", "After a crash"),
        ),
        Symptom(
            "settings_in_trainer",
            "`SFTTrainer` refuses `dataset_text_field`, `packing` and their like",
            "What describes the run moved from the trainer to its config.",
            "Give it to `SFTConfig(…)` and that to the trainer as `args=`.",
            _unexpected(_TRAINER, "dataset_text_field", "packing", "dataset_kwargs"),
            proof=("Chapter4", "From rows to batches"),
        ),
        Symptom(
            "completion_only_collator",
            "`DataCollatorForCompletionOnlyLM` cannot be imported",
            "TRL dropped the collator that looked for the answer's beginning in the tokens.",
            "Use rows of `prompt` and `completion` messages: the loss is on the completion "
            "by itself. Or `assistant_only_loss=True` with a template that has markers.",
            r"cannot import name 'DataCollatorForCompletionOnlyLM'",
            proof=("Chapter4", "Markers: a template that knows who speaks"),
        ),
        Symptom(
            "constant_length_dataset",
            "`ConstantLengthDataset` cannot be imported",
            "TRL packs by a function now.",
            'Use `SFTConfig(packing=True)`, or `trl.pack_dataset(…, strategy="wrapped")`.',
            r"cannot import name 'ConstantLengthDataset'",
            proof=("Chapter4", "From rows to batches"),
        ),
        Symptom(
            "setup_chat_format",
            "`setup_chat_format` cannot be imported",
            "It is gone from TRL.",
            "Set `tokenizer.chat_template` yourself (`chat.chatml_template()`), or use "
            "`trl.clone_chat_template`.",
            r"cannot import name 'setup_chat_format'",
            proof=("Chapter4", "Bring your own template"),
        ),
        Symptom(
            "keys_not_to_convert",
            "`get_keys_to_not_convert` cannot be imported",
            "It moved inside transformers.",
            "`from transformers.quantizers.base import get_keys_to_not_convert`.",
            r"cannot import name 'get_keys_to_not_convert'",
            proof=("Chapter2", "What is not quantized"),
        ),
        Symptom(
            "remote_code",
            "a model's own code fails: `get_usable_length`, `seen_tokens`, `LossKwargs`",
            "`trust_remote_code=True` runs the Python file in the model's repository, "
            "written for an older transformers. Phi-3 is the well-known case.",
            "Leave `trust_remote_code` out: transformers brings these architectures itself.",
            r"has no attribute '(get_usable_length|seen_tokens|get_max_length)'"
            r"|cannot import name 'LossKwargs'",
            proof=("Chapter2", "Where the printed book differs"),
        ),
        Symptom(
            "other_keyword",
            "another keyword is refused by `SFTConfig`, `SFTTrainer` or a loading call",
            "Either it was renamed, or it is given to the wrong one of the two.",
            "`help(trl.SFTConfig)` lists today's names; each chapter ends with a table of "
            "the book's calls and today's.",
            _unexpected("(SFTConfig|TrainingArguments|SFTTrainer|Trainer|LoraConfig)", ".*"),
            proof=("Chapter5", "SFTTrainer, argument by argument"),
        ),
    ],
    "Loading and quantizing": [
        Symptom(
            "purely_quantized",
            "“You cannot perform fine-tuning on purely quantized models”",
            "Between one four-bit code and the next there is nothing, so the weights "
            "cannot "
            "be nudged.",
            "Put an adapter on it: `get_peft_model(model, LoraConfig(…))`.",
            r"fine-tuning on purely quantized models",
            proof=("Chapter0", "A quantized model cannot be trained by itself"),
        ),
        Symptom(
            "cast_quantized",
            "`.half()` or `.to(dtype)` is refused for a quantized model",
            "Its weights are packed codes; casting them would destroy them.",
            "Choose `bnb_4bit_compute_dtype` (or `dtype=`) when loading.",
            r"`\.(half|float|to)\(?\)?` is not supported for",
            proof=("Chapter2", "Stored in one type, computed in another"),
        ),
        Symptom(
            "packed_shapes",
            "“mat1 and mat2 shapes cannot be multiplied (… and …x1)”",
            "You multiplied by a four-bit layer's `weight`: it holds two codes per "
            "byte in a "
            "single column, not a matrix.",
            "Call the layer, or unpack first: `bitsandbytes.functional.dequantize_4bit`.",
            r"mat1 and mat2 shapes cannot be multiplied \(\d+x\d+ and \d+x1\)",
            proof=("Chapter2", "The state dict, buffer by buffer"),
        ),
        Symptom(
            "mixed_dtypes",
            "“mat1 and mat2 must have the same dtype”",
            "Activations in one type meet weights in another, often after preparing a "
            "quantized model (norms become float32) or casting half of it.",
            "On a CPU: `training.match_dtypes(model)`. On a GPU: `bf16=True` in the "
            "config, "
            "so that autocast reconciles them.",
            r"must have the same dtype, but got|expected scalar type \w+ but found",
            proof=("Chapter2", "How data types flow"),
        ),
        Symptom(
            "meta_tensor",
            "“Cannot copy out of meta tensor; no data!”",
            "Part of the model was never loaded: it did not fit, or the loading was cut.",
            'Load onto one device (`device_map={"": 0}`), quantize, or take a smaller model.',
            r"Cannot copy out of meta tensor",
            proof=("Chapter2", "All of them in one table"),
        ),
        Symptom(
            "flash_attention",
            "flash attention “cannot be used”, or `flash_attn` is not there",
            "It is a package of its own and needs an NVIDIA card, Ampere or newer; a T4 is older.",
            'Take `attn_implementation="sdpa"`; nearly as good. `doctor.report()` says '
            "what this machine could have.",
            r"FlashAttention\d? has been toggled on|No module named 'flash_attn'"
            r"|FlashAttention only supports Ampere"
            r"|use Flash Attention \d with a model not initialized on GPU",
            proof=("Chapter5", "Attention, and what flash attention does"),
        ),
        Symptom(
            "flash_build",
            "`flash_attn_2_cuda…so: undefined symbol`",
            "This flash-attn was built for another torch than the one that is installed.",
            "`pip uninstall flash-attn` and take SDPA, or install a build for exactly this "
            "torch, CUDA and Python: `torch.__version__` says which.",
            r"flash_attn\w*\.\S*: undefined symbol"
            r"|DLL load failed while importing flash_attn",
            provoked=False,
        ),
        Symptom(
            "flash_float32",
            "“FlashAttention only support fp16 and bf16 data type”",
            "Its kernels know 16-bit numbers only, and the model, or a layer of it that "
            "was made float32 for training, hands it float32.",
            'Load with `attention="sdpa"` (elsewhere `attn_implementation="sdpa"`), or '
            "with `dtype=torch.bfloat16`, and train with `bf16=True`: autocast converts.",
            r"Flash ?Attention( \d)? only supports? (fp16|torch\.float16)",
            proof=("Chapter5", "Attention, and what flash attention does"),
            provoked=False,
        ),
        Symptom(
            "bitsandbytes_library",
            "“CUDA SETUP ERROR: Missing dependency: libnvJitLink.so.13” (bitsandbytes)",
            "bitsandbytes is there and was built for this CUDA; a library of CUDA that it "
            "needs is where the system's loader does not look.",
            "`python -m bitsandbytes` shows what it tried. pip puts these libraries into "
            "folders such as `site-packages/nvidia/cu13/lib`: add the one that holds it to "
            "`LD_LIBRARY_PATH` and start Python anew.",
            r"(CUDA|ROCm) SETUP ERROR: Missing dependency"
            r"|lib(nvJitLink|cu\w+)\.so\S*: cannot open shared object file",
        ),
        Symptom(
            "bitsandbytes_build",
            "“bitsandbytes native library functionality but it's not available”",
            "It brings one compiled library for each version of CUDA, and none that fits "
            "this torch's (or `BNB_CUDA_VERSION` asks for another); or it was installed "
            "from its source, without any.",
            "`pip install -U bitsandbytes`; `python -m bitsandbytes` lists what there is. "
            "Unset `BNB_CUDA_VERSION`, or set it to the nearest version listed (129 for "
            "12.9).",
            r"native library functionality but it's not available"
            r"|not available in CPU-only version of bitsandbytes"
            r"|No compatible (CUDA|ROCm) binary found",
        ),
        Symptom(
            "hub_unreachable",
            "“We couldn't connect to 'https://huggingface.co'”",
            "No network, a proxy, or offline mode, and the files are not in the cache.",
            "Connect once. Without a network, take `models.load_model(models.EMBEDDED)`.",
            r"couldn't connect to 'https://huggingface\.co'|LocalEntryNotFoundError"
            r"|OfflineModeIsEnabled",
            proof=("Chapter0", "1. A base model in four bits"),
        ),
        Symptom(
            "gated",
            "“401”, “403” or “gated repo” from the Hub",
            "The model's owner wants you to accept a licence first, or your token is missing.",
            "Accept it on the model's page, then `hf auth login` (in Colab: a secret "
            "called "
            "HF_TOKEN).",
            r"GatedRepoError|[Aa]ccess to model .* is restricted|gated repo"
            r"|40[13] Client Error",
            proof=("Chapter0", "Share it"),
            provoked=False,
        ),
        Symptom(
            "no_model_there",
            "“Unrecognized model … Should have a `model_type` key”",
            "The folder holds no model: often an adapter's folder, a checkpoint's "
            "parent, or "
            "a typing error in a Hub id.",
            "Look inside. An adapter is loaded on its base: `PeftModel.from_pretrained`.",
            r"Unrecognized model in|does not appear to have a file named config\.json",
            proof=("Chapter3", "Taking an adapter off, and loading it back"),
        ),
    ],
    "Adapters": [
        Symptom(
            "targets_unknown",
            "“Please specify `target_modules`”",
            "PEFT has a table of architectures, and yours is not in it.",
            'Say `target_modules="all-linear"`, or `lora.find_target_modules(model)`.',
            r"Please specify `target_modules`",
            proof=("Chapter0", "2. A small adapter to train"),
        ),
        Symptom(
            "targets_not_found",
            "“Target modules … not found in the base model”",
            "The names are another architecture's (`qkv_proj` is Phi-3's, `q_proj` Llama's).",
            '`lora.find_target_modules(model)` lists them; `"all-linear"` fits every model.',
            r"Target modules .* not found in the base model",
            proof=("Chapter3", "Where to put adapters, in any architecture"),
        ),
        Symptom(
            "adapter_twice",
            "“You passed a `PeftModel` instance together with a `peft_config`”",
            "The model has an adapter already, and the trainer was asked to add one.",
            "Give one of the two: a plain model with `peft_config=`, or the adapted model.",
            r"You passed a `PeftModel` instance together with a `peft_config`",
            proof=("Chapter0", "2. A small adapter to train"),
        ),
        Symptom(
            "adapter_missing",
            "“Can't find 'adapter_config.json'”",
            "There is no adapter in that folder.",
            "Give the folder that `save_pretrained` wrote, or a `checkpoint-N` inside it.",
            r"Can't find 'adapter_config\.json'",
            proof=("Chapter3", "Adapters on disk"),
        ),
        Symptom(
            "adapter_other_base",
            "“size mismatch” while loading an adapter or a checkpoint",
            "It was trained on another base, or on one whose vocabulary had been resized.",
            "Load the base named in `adapter_config.json`, and resize its embedding as in "
            "training: `chat.prepare_model(model, tokenizer)`.",
            r"size mismatch for",
            proof=("Chapter6", "An adapter is nothing without its base"),
        ),
        Symptom(
            "nothing_requires_grad",
            "“element 0 of tensors does not require grad”",
            "Nothing upstream of the loss is trainable: everything frozen, an "
            "adapter loaded "
            "for inference, or checkpointing over a frozen embedding.",
            "`lora.check_training(model)` says which. Load with `is_trainable=True`, "
            "or call "
            "`model.enable_input_require_grads()`.",
            r"element 0 of tensors does not require grad",
            proof=("Chapter3", "A gallery of relatives"),
        ),
        Symptom(
            "empty_optimizer",
            "“optimizer got an empty parameter list”",
            "The optimizer was asked to train what is trainable, and nothing is.",
            "Add the adapter before making the optimizer; `lora.check_training(model)`.",
            r"optimizer got an empty parameter list",
            proof=("Chapter3", "The silent failure: an adapter that does not learn"),
        ),
        Symptom(
            "frozen_adapter",
            "training runs, and the model answers exactly as before",
            "The adapter never moved: frozen, disabled, or a learning rate meant for whole "
            "models. Nothing is raised.",
            "`lora.check_training(model)` raises the alarm; use 1e-4 to 3e-3 for adapters.",
            words=r"(nothing|does(n't| not)|not|never)\b.{0,30}\b(learn|chang|improv)"
            r"|loss.{0,30}(not|n't|hardly|barely).{0,20}(mov|fall|go down|drop|chang)"
            r"|same (answers?|output)|as before",
            proof=("Chapter3", "The silent failure: an adapter that does not learn"),
        ),
    ],
    "Data, templates and masks": [
        Symptom(
            "no_chat_template",
            "“tokenizer.chat_template is not set”",
            "A base model's tokenizer has none.",
            "`tokenizer.chat_template = chat.chatml_template()`, then train with it.",
            r"tokenizer\.chat_template is not set|does not have a chat template",
            proof=("Chapter4", "Bring your own template"),
        ),
        Symptom(
            "no_markers",
            "“The chat template is not training-compatible”",
            "`assistant_only_loss` needs `{% generation %}` around what the assistant says.",
            "`chat.chatml_template()` has the markers; or use prompt and completion.",
            r"chat template is not training-compatible",
            proof=("Chapter4", "Markers: a template that knows who speaks"),
        ),
        Symptom(
            "roles",
            "“Conversation roles must alternate”, “System role not supported”",
            "The template itself refuses the order or kind of your messages.",
            "Begin with the user, alternate, and put a system message into the first "
            "question where the template knows none.",
            r"roles must alternate|[Ss]ystem role not supported",
            proof=("Chapter4", "Bring your own template"),
        ),
        Symptom(
            "no_text_column",
            "`KeyError: 'text'` from the trainer",
            "The rows have none of the columns TRL understands.",
            "Rename them: `messages`, or `prompt` and `completion`, or `text`.",
            r"KeyError: '?text'?$",
            proof=("Chapter4", "Four ways to write data down"),
        ),
        Symptom(
            "no_dataset",
            "“`train_dataset` is required”",
            "A trainer without data could once be made; no longer.",
            "Give it the data set, also when you only want its data loader.",
            r"`train_dataset` is required",
            proof=("Chapter5", "How much goes in at once"),
        ),
        Symptom(
            "no_padding_token",
            "“Asking to pad but the tokenizer does not have a padding token”",
            "Rows of a batch must be equally long, and nothing was chosen to fill them up.",
            "`chat.prepare_tokenizer(tokenizer)`. Not `pad = eos`, whatever the message says.",
            r"does not have a padding token",
            proof=("Chapter4", "1. The model that never stops"),
        ),
        Symptom(
            "unequal_rows",
            "“Unable to create tensor, you should probably activate truncation and/or padding”",
            "Rows of different length cannot become one tensor; or a text column was left in.",
            "`padding=True`, or let the trainer's collator do it.",
            r"Unable to create tensor, you should probably activate truncation",
            proof=("Chapter4", "Padding side and attention mask"),
        ),
        Symptom(
            "token_out_of_range",
            "“index out of range in self”",
            "The tokenizer has more tokens than the embedding has rows.",
            "`chat.prepare_model(model, tokenizer)` resizes when it must.",
            r"IndexError: index out of range in self",
            proof=("Chapter4", "Bring your own template"),
        ),
        Symptom(
            "device_assert",
            "“device-side assert triggered”",
            "On a GPU an index out of range shows so, some calls later: a token id beyond "
            "the embedding, or a label that is neither a token nor -100.",
            "Run the same batch on the CPU for the true message, then as above. The kernel "
            "must be restarted.",
            r"device-side assert triggered",
            proof=("Chapter4", "Bring your own template"),
            provoked=False,
        ),
        Symptom(
            "endless",
            "the model never stops, or repeats itself to the limit",
            "It never learned the end of a turn: pad = eos, a template that forgets "
            "the end, "
            "or a server that does not know the stop word.",
            "`chat.mask_view` on one batch names it (`eos_not_trained`). When "
            "serving, give "
            "the stop word.",
            words=r"never (stops|ends)|endless|does(n't| not) stop|keeps (talking|going)"
            r"|repeat|on and on",
            proof=("Chapter4", "1. The model that never stops"),
        ),
        Symptom(
            "loss_nan",
            "the loss is `nan`, or 0, from the first step",
            "Nothing is trained (every label is -100, often because everything was "
            "cut), or "
            "float16 overflowed.",
            "`chat.mask_view` on one batch (`nothing_trained`); raise `max_length`; use "
            "bfloat16 where it is native.",
            words=r"\bnan\b|not a number|loss.{0,10}(is|=|of)? ?(0\.0|0|zero)\b",
            proof=("Chapter4", "4. A loss that is not a number"),
        ),
        Symptom(
            "asks_questions",
            "the model writes your questions as well as its answers",
            "The prompt was trained too.",
            "Prompt and completion columns, or `assistant_only_loss`; see the mask.",
            words=r"(asks|writes|continues) (my|the|your|its own)? ?(question|prompt|user)",
            proof=("Chapter4", "3. The model that asks the questions"),
        ),
    ],
    "The run": [
        Symptom(
            "bf16_without_support",
            "“Your setup doesn't support bf16/gpu”",
            "TRL turns bf16 on by default, and no suitable GPU was found.",
            "`**training.machine_settings(here)`, or `bf16=False, use_cpu=True`.",
            r"Your setup doesn't support bf16",
            proof=("Chapter5", "SFTTrainer, argument by argument"),
        ),
        Symptom(
            "scaler_float16",
            "“Attempting to unscale FP16 gradients”",
            "`fp16=True` scales the gradients, and for that they must be float32; those of "
            "a model loaded in float16 are not.",
            "`training.LeanSFTTrainer` sees to it. With another trainer, load in float32, "
            "or train adapters, which PEFT makes float32.",
            "Attempting to unscale FP16 gradients",
            proof=("Chapter5", "Number formats in training"),
        ),
        Symptom(
            "scaler_bfloat16",
            "“_amp_foreach_non_finite_check_and_unscale_cuda not implemented for 'BFloat16'”",
            "`fp16=True` (a T4) scales the gradients, and for that they must be float32. "
            "TRL makes the adapters of quantized models bfloat16.",
            "`training.LeanSFTTrainer` sees to it. With another trainer, after making it: "
            "`for p in trainer.model.parameters(): p.data = p.data.float() if "
            "p.requires_grad else p.data`.",
            r"non_finite_check_and_unscale\w*\W+not implemented",
            proof=("Chapter5", "Number formats in training"),
            provoked=False,
        ),
        Symptom(
            "bf16_on_t4",
            "training on a T4 is many times slower than others report",
            "It says that it supports bfloat16, and emulates it.",
            "`fp16=True, bf16=False`; `torch.cuda.is_bf16_supported("
            "including_emulation=False)` tells the truth.",
            words=r"\bT4\b.{0,60}\bslow|\bslow.{0,60}\bT4\b",
            proof=("Chapter2", "Half precision"),
            provoked=False,
        ),
        Symptom(
            "bf16_kernel",
            "“Feature '.bf16' requires .target sm_80 or higher”",
            "A kernel that Triton compiles (TRL's loss, `torch.compile`) was given "
            "bfloat16 on a card older than Ampere, such as a T4. Reported with older "
            "Tritons.",
            "`**training.machine_settings(here)`, or `fp16=True, bf16=False` and a model "
            "loaded in float16: `SFTConfig` turns bf16 on when nothing is said.",
            r"Feature '[^'\n]*\bbf16[^'\n]*' requires \.target sm_80",
            proof=("Chapter5", "Number formats in training"),
            provoked=False,
        ),
        Symptom(
            "two_devices",
            "“Expected all tensors to be on the same device”",
            "The model is on the card and its input on the CPU, or the other way round.",
            "`ids.to(model.device)`, and `**batch.to(model.device)` for what a tokenizer "
            "returns. For a lesson on a small model, load it on the CPU: "
            '`models.load_model(models.EMBEDDED, device="cpu")`.',
            r"Expected all tensors to be on the same device",
            words=r"tensors?\b.{0,30}\b(cuda(:\d)?,? and cpu|cpu,? and cuda"
            r"|(different|same|two) devices?)\b",
        ),
        Symptom(
            "data_parallel",
            "“does not support `nn.DataParallel`”",
            "Several cards are visible to one process, and TRL's trainers take one.",
            "Restart the kernel and begin with the bootstrap cell: it sets "
            "`CUDA_VISIBLE_DEVICES=0`. For a program of your own, set it in the shell. To "
            "use all cards, start one process for each: `accelerate launch`.",
            r"does not support `nn\.DataParallel`",
            proof=("Chapter5", "Outgrowing one GPU"),
        ),
        Symptom(
            "duplicate_gpu",
            "NCCL: “Duplicate GPU detected : rank 1 and rank 0 both on CUDA device”",
            "More processes were started than there are cards, or all of them took the same one.",
            "As many processes as `torch.cuda.device_count()` says, started by "
            "`accelerate launch` or `torchrun`. To try two processes without two cards: "
            "`use_cpu: true`.",
            r"Duplicate GPU detected",
            proof=("Chapter5", "Outgrowing one GPU"),
            provoked=False,
        ),
        Symptom(
            "cuda_memory",
            "“CUDA out of memory”",
            "The worst instant of a step needs more than the card has.",
            "In this order: smaller batch with accumulation, checkpointing, shorter "
            "`max_length`, four bits. Predict before you try: `python -m helpers plan`.",
            r"CUDA out of memory|OutOfMemoryError",
            proof=("Chapter5", "Will it fit?"),
            provoked=False,
        ),
        Symptom(
            "cpu_memory",
            "“DefaultCPUAllocator: can't allocate memory”",
            "The machine's memory is full.",
            "Smaller batch or shorter rows; close other notebooks, each holds its model. "
            "In bfloat16, `model.generate` copies the head once per row of a batch "
            "(PyTorch issue 151934): use float32, or the course's `generation.generate`.",
            r"DefaultCPUAllocator: (can't allocate|not enough) memory",
            proof=("Chapter5", "How much goes in at once"),
        ),
        Symptom(
            "backward_twice",
            "“Trying to backward through the graph a second time”",
            "A loss was used for `backward()` twice; the first call freed what it needs.",
            "Compute the loss anew for each update, as the plain loop does.",
            r"Trying to backward through the graph a second time",
            proof=("Chapter5", "The loop underneath"),
        ),
        Symptom(
            "no_eval_data",
            "“You have set `args.eval_strategy` … but you didn't pass an `eval_dataset`”",
            "Evaluation was asked for without anything to evaluate on.",
            "Give `eval_dataset=`: rows kept aside, not the test set.",
            r"you didn't pass an `eval_dataset`",
            proof=("Chapter5", "The run"),
        ),
        Symptom(
            "best_model",
            "“load_best_model_at_end requires the save and eval strategy to match”",
            "The best model can only be loaded if one was saved when it was judged.",
            "The same `save_strategy` and `eval_strategy`, and the same steps.",
            r"load_best_model_at_end requires",
            proof=("Chapter5", "The run"),
        ),
        Symptom(
            "disk_full",
            "“No space left on device”",
            "The disk is full, often of checkpoints and of the Hub's cache.",
            "`save_total_limit=1`; delete `outputs/`; `hf cache ls` shows what the "
            "Hub left. "
            "`doctor.report()` says how much is left.",
            r"No space left on device",
            proof=("Chapter5", "Saving: three things you may mean"),
        ),
    ],
    "GGUF, llama.cpp and Ollama": [
        Symptom(
            "no_converter",
            "llama.cpp has no converter for the architecture",
            "Every architecture needs its own code there; OPT, for one, has none.",
            "Fine-tune a Llama, Qwen, Gemma, Phi or Mistral kind if it must become GGUF.",
            r"has no converter for|Model \w+ is not supported",
            proof=("Chapter6", "The adapter alone"),
            own=True,
        ),
        Symptom(
            "adapter_with_embeddings",
            "an adapter is refused: it holds embeddings, a head or `modules_to_save`",
            "llama.cpp applies low-rank pairs and nothing else.",
            "Merge into the full-precision base, convert the merged model.",
            r"which is no low-rank pair|Embeddings is present in the adapter",
            proof=("Chapter6", "The adapter alone"),
            own=True,
        ),
        Symptom(
            "damaged_gguf",
            "a GGUF file is cut short or damaged",
            "An interrupted download or a full disk; sometimes a web page saved as a model.",
            "Compare the size, download or convert again.",
            r"is cut short or damaged|tensor .* data is not within the file bounds",
            proof=("Chapter6", "GGUF: one file, everything in it"),
            own=True,
        ),
        Symptom(
            "illegal_instruction",
            "a program “was killed by SIGILL” (illegal instruction)",
            "It uses instructions that this processor, or the virtual machine around it, "
            "refuses: often AMX, which some clouds list and do not allow.",
            "Build it for any processor (`cmake -DGGML_NATIVE=OFF`), or start it with "
            "`--no-repack`. The course does so with a llama.cpp of its own: unset "
            "`LLAMA_CPP` and take the other one off your PATH.",
            r"killed by SIGILL|Illegal instruction \(core dumped\)",
            own=True,
        ),
        Symptom(
            "llamacpp_crash",
            "a program “was killed by SIGSEGV”, “SIGABRT” or “SIGBUS”",
            "It crashed: a check of its own failed (SIGABRT; its last words say which), or "
            "the file it read was cut short or the disk filled up meanwhile (SIGBUS).",
            "`gguf.inspect(path)` finds a damaged file: make it anew. If it crashes on a "
            "good one, delete the folder `llama.cpp-…` in `runtime.cache_folder()` and it "
            "is built again, or name another build in `LLAMA_CPP`.",
            r"killed by SIG(SEGV|ABRT|BUS)|GGML_ASSERT",
            own=True,
        ),
        Symptom(
            "port_taken",
            "“Address already in use”",
            "Another server, or a forgotten one, listens on that port.",
            "`serving.LlamaServer(path)` takes a free one; or stop the other.",
            r"Address already in use|port \d+ is taken",
            proof=("Chapter6", "A server, on this machine only"),
        ),
        Symptom(
            "ollama_silent",
            "Ollama does not answer",
            "It is not installed, or `ollama serve` is not running.",
            "Start it; in Colab from a cell in the background. llama.cpp's server needs no "
            "installation at all.",
            r"Ollama does not answer|11434.*([Cc]onnection refused|Failed to establish)",
            proof=("Chapter6", "Ollama"),
            own=True,
        ),
        Symptom(
            "garbage_when_served",
            "good in the notebook, garbage in Ollama or the server",
            "The prompt differs: another template, BOS twice, no generation prompt, "
            "no stop "
            "word. The weights are hardly ever to blame.",
            "`serving.template_parity(tokenizer, talks, …)` compares text and tokens.",
            words=r"garbage|gibberish|(good|fine|works) in (the|my) notebook"
            r"|(ollama|gguf|llama\.cpp).{0,40}(bad|worse|wrong|nonsense)",
            proof=("Chapter6", "Four ways to get garbage"),
        ),
    ],
    "The machine": [
        Symptom(
            "module_missing",
            "“No module named 'trl'” (or another of the course's packages)",
            "The packages are in another environment than the one this kernel runs in.",
            "Local: start JupyterLab with `python -m helpers lab` from the course's "
            "environment. Colab and pods: run the bootstrap cell.",
            r"No module named "
            r"'(torch|trl|peft|transformers|bitsandbytes|datasets|accelerate"
            r"|gguf|sacrebleu|helpers)'",
            proof=("Chapter0", "Chapter 0: the whole journey, quickly"),
        ),
        Symptom(
            "killed",
            "the kernel died, or a program “was killed by SIGKILL”",
            "Nearly always memory: when it is full, the system ends the process that holds "
            "most of it, without a word.",
            "`doctor.report()` says what is free. Close other notebooks; smaller batch or "
            "shorter rows, a smaller model. For llama.cpp: less context, fewer slots, or a "
            "smaller kind such as Q4_K_M.",
            r"DeadKernelError|[Kk]ernel (has |appears to have )?died|killed by SIGKILL"
            r"|[Ss]ignal 9 \(SIGKILL\)|exit ?code\s*:? -9\b",
            words=r"kernel (\w+ )?(dies|dying|crashe[sd]|crashing)\b|session crashed",
        ),
        Symptom(
            "no_kernel_image",
            "“no kernel image is available for execution on the device”",
            "torch (or bitsandbytes, or flash-attn) was built without code for this "
            "generation of cards: the card is newer than the build, or too old for it.",
            "Compare `torch.cuda.get_device_capability()` with "
            "`torch.cuda.get_arch_list()`. A new card: the newest torch. An old one: a "
            "torch built for an older CUDA. Then a bitsandbytes that fits.",
            r"no kernel image is available|is not compatible with the current PyTorch",
            provoked=False,
        ),
        Symptom(
            "numpy_binary",
            "“numpy.dtype size changed, may indicate binary incompatibility”",
            "numpy was replaced under packages that were built for another one, or after "
            "they had been loaded.",
            "Restart the kernel. If it stays: on Colab, start a fresh runtime and let the "
            "bootstrap cell decide what to install.",
            r"numpy\.dtype size changed|compiled using NumPy 1\.x cannot be run in NumPy 2",
            proof=("Chapter0", "Chapter 0: the whole journey, quickly"),
            provoked=False,
        ),
        Symptom(
            "restart_needed",
            "the bootstrap cell asks for a restart",
            "A library was loaded before it was replaced, or before it was told which card "
            "or cache to use; it does not look again.",
            "Restart the session once and run the cell first of all. What was installed "
            "and downloaded stays; variables are gone.",
            r"RestartNeeded",
            proof=("Chapter0", "Chapter 0: the whole journey, quickly"),
            own=True,
        ),
    ],
}

SYMPTOMS = [symptom for section in SECTIONS.values() for symptom in section]
