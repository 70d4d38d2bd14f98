"""A run that is killed goes on from its checkpoint as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.course import notebooks

pytestmark = pytest.mark.slow
SCRIPT = """\
import json, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig
from helpers import chat, data, models, training

folder, pause = sys.argv[1], float(sys.argv[2])
tokenizer = models.load_tokenizer(models.EMBEDDED)
tokenizer.chat_template = chat.chatml_template()
chat.prepare_tokenizer(tokenizer)
torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
config = LlamaConfig(**shape, num_attention_heads=4, vocab_size=len(tokenizer))
model = get_peft_model(
    LlamaForCausalLM(config),
    LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear"),
)
settings = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
settings |= {"activation_checkpointing": False, "per_device_train_batch_size": 4}
settings |= {"max_steps": 14, "save_steps": 5, "logging_steps": 1, "seed": 3}
settings |= {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 3}


class Steps(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print("step", state.global_step, flush=True)
        import time; time.sleep(pause)


trainer = training.LeanSFTTrainer(
    chat.prepare_model(model, tokenizer),
    args=SFTConfig(folder, **settings),
    train_dataset=data.load_yoda("train").select(range(40)),
    processing_class=tokenizer,
    callbacks=[Steps()],
)
trainer.train(resume_from_checkpoint=sys.argv[3] == "resume")
losses = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
print("losses", json.dumps(losses))
"""


def start(folder, pause=0.0, how="new"):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(pause), how],
        cwd=notebooks.root(),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return {int(k): v for k, v in json.loads(out.split("losses ")[1]).items()}


def test_a_run_killed_between_checkpoints_ends_with_the_same_loss(tmp_path):
    undisturbed = losses(start(tmp_path / "undisturbed"))
    assert len(undisturbed) == 14
    victim = start(tmp_path / "killed", pause=0.3)
    for line in victim.stdout:
        if line.startswith("step 8"):  # checkpoints were written at 5; the next is 10
            os.kill(victim.pid, signal.SIGKILL)
            break
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    saved = [p.name for p in (tmp_path / "killed").glob("checkpoint-*")]
    assert saved == ["checkpoint-5"]

    began = time.time()
    resumed = losses(start(tmp_path / "killed", how="resume"))
    newest = (tmp_path / "killed" / "checkpoint-14").stat().st_mtime
    assert newest >= began - 1
    assert min(resumed) <= 6, "the log of the first five came with the checkpoint"
    for step in range(6, 15):
        assert resumed[step] == pytest.approx(undisturbed[step], abs=1e-4), step
