"""One training run of a peer, in a process of its own: transformers' Trainer with PEFT, or TRL's SFTTrainer.

    python _peer.py ARM TASK.json RESULT.json

TASK names a model folder, rows of token ids with a mask of the trained ones, and the run's settings. Every arm takes the same rows in the same order, as
many rows a step, with the same LoRA and the same learning rate; what differs is how the step is computed. RESULT gets seconds and loss of each step.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arm: str, task: dict) -> dict:
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    lora = LoraConfig(r=task["r"], lora_alpha=2 * task["r"], target_modules="all-linear", task_type="CAUSAL_LM")
    seconds: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    steps = len(task["rows"]) // task["rows_per_step"]
    common = {"output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": task["rows_per_step"], "max_steps": steps, "logging_steps": 1,
              "learning_rate": task["learning_rate"], "lr_scheduler_type": "constant", "weight_decay": 0.0, "train_sampling_strategy": "sequential",
              "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
    if arm == "trainer":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(task["model"]), lora)
        rows = [{"input_ids": r["input_ids"], "attention_mask": [1] * len(r["input_ids"]),
                 "labels": [t if m else -100 for t, m in zip(r["input_ids"], r["trained"])]} for r in task["rows"]]
        trainer = Trainer(model=model, args=TrainingArguments(**common), train_dataset=Dataset.from_list(rows), callbacks=[Watch()],
                          data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True))
    else:
        from trl import SFTConfig, SFTTrainer

        rows = [{"input_ids": r["input_ids"], "completion_mask": [int(m) for m in r["trained"]]} for r in task["rows"]]
        best = {} if arm == "trl" else {"gradient_checkpointing": False, "padding_free": True, **task.get("best", {})}
        config = SFTConfig(max_length=None, completion_only_loss=True, **common, **best)
        trainer = SFTTrainer(model=task["model"], args=config, train_dataset=Dataset.from_list(rows), peft_config=lora, processing_class=tokenizer,
                             callbacks=[Watch()])
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "losses": losses, "peak_bytes": peak}


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as f:
        found = main(sys.argv[1], json.load(f))
    with open(sys.argv[3], "w", encoding="utf-8") as f:
        json.dump(found, f)
