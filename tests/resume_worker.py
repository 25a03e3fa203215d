"""Runs a training script in forked processes and has them killed by SIGKILL; prints what became of them, as JSON.

    python tests/resume_worker.py image|text FOLDER

Forking spares each run the imports.
"""

import gc
import importlib
import json
import os
import random
import signal
import sys
import threading
import traceback
from functools import partial
from pathlib import Path

import torch
import unaligned
from transformers import TrainerCallback, trainer


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

MODEL = (
    "num_hidden_layers=1,num_attention_heads=2,head_dim=4,intermediate_size=16,hidden_dropout_prob=0.1,hidden_size=8"
)
COMMON = f"""--config_overrides {MODEL} --per_device_train_batch_size 8 --max_steps 20 --learning_rate 0.01
    --eval_strategy steps --eval_steps 4 --save_strategy steps --save_steps 4 --save_total_limit 2 --logging_steps 1
    --load_best_model_at_end true --metric_for_best_model loss --early_stopping_patience 5
    --disable_tqdm true --use_cpu true""".split()
IMAGE = [
    "--dataset_name",
    "digits",
    "--image_size",
    "16",
    "--patch_size",
    "8",
    "--max_train_samples",
    "60",
    "--max_eval_samples",
    "20",
    "--crop_scale",
    "0.5",
    "--flip_probability",
    "0.5",
    "--rand_augment_ops",
    "1",
    "--mixup_alpha",
    "0.8",
    "--cutmix_alpha",
    "1.0",
    "--ema_decay",
    "0.8",
    "--layer_lr_decay",
    "0.75",
]
TEXT = ["--vocab_size", "300", "--block_size", "16", "--tokenization_shards", "6", "--validation_share", "0.2"]


class Kill(TrainerCallback):
    """Kills this process some milliseconds after a step: in the middle of whatever it does then."""

    step, delay = None, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            threading.Timer(self.delay, die).start()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(step):
    """Dies when half of the optimizer's state of a checkpoint is on the disk."""
    save = torch.save

    def half(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if str(path).endswith(f"checkpoint-{step}/optimizer.pt"):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = half


def kill_before_rename(step):
    """Dies when a checkpoint is complete and not yet in its place."""
    rename = Path.rename

    def or_die(path, target):
        if Path(target).name == f"checkpoint-{step}":
            die()
        return rename(path, target)

    Path.rename = or_die


def kill_in_last_save():
    """Dies when some files of the trained model have their places and others not."""
    replace = os.replace

    def or_die(source, target):
        if Path(source).name == "model.safetensors":
            die()
        replace(source, target)

    os.replace = or_die


def kill_in_tokenisation(part):
    """Dies in a part of the tokenisation, counted from 0."""
    packer = importlib.import_module("training.text_blocks").Packer
    call, count = packer.__call__, [0]

    def or_die(self, documents):
        if count[0] == part:
            die()
        count[0] += 1
        return call(self, documents)

    packer.__call__ = or_die


def kill_at(step, delay):
    Kill.step, Kill.delay = step, delay


def run(script, arguments, patch=None):
    """The exit status of a run, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            if patch is not None:
                patch()
            importlib.import_module(script).main(arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(kind, folder):
    torch.set_num_threads(1)
    unaligned.follow_switch()
    script = {"image": "run_image_classification", "text": "run_clm"}[kind]
    importlib.import_module(script)
    importlib.import_module("training.model_card")
    trainer.DEFAULT_CALLBACKS.append(Kill)
    arguments = [*COMMON, *(IMAGE if kind == "image" else [*TEXT, "--train_dir", f"{folder}/texts"])]
    # What is imported stays: no forked process goes through it, or copies it, to look for garbage.
    gc.freeze()
    moments = random.Random(0)
    patches = [
        lambda: kill_at(2, 0.0),
        lambda: kill_in_save(8),
        lambda: kill_before_rename(12),
        *(partial(kill_at, moments.randrange(8, 19), moments.uniform(0, 0.05)) for _ in range(3)),
    ]
    if kind == "text":
        patches.insert(0, lambda: kill_in_tokenisation(3))
    report = {"killed": [], "checkpoints": [], "blocks": []}
    out = sys.stdout
    sys.stdout = sys.stderr
    report["whole"] = run(script, [*arguments, "--output_dir", f"{folder}/whole", "--cache_dir", f"{folder}/cache-1"])
    arguments += ["--output_dir", f"{folder}/killed", "--cache_dir", f"{folder}/cache-2"]
    for patch in patches:
        report["killed"].append(run(script, arguments, patch))
        report["checkpoints"].append(sorted(path.name for path in Path(folder, "killed").glob("checkpoint-*")))
        blocks = Path(folder, "cache-2").rglob("*-of-*.arrow")
        report["blocks"].append({str(path): path.stat().st_mtime_ns for path in blocks})
    report["last save"] = run(script, arguments, kill_in_last_save)
    report["finished"] = run(script, arguments)
    print(json.dumps(report), file=out)


if __name__ == "__main__":
    main(*sys.argv[1:])
