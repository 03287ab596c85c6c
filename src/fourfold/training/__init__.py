"""The trainer, its callbacks and the run folder.

trainer.py      FourfoldTrainer: TRL's SFTTrainer with our loss, checkpoints and way out; made by building.py
options.py      TrainingOptions, by Hugging Face's names, and the tables of optimizers and schedules
loss.py         cross entropy over the supervised positions only
methods.py      MethodOptions: what is learned, by TRL's names
preference.py   the trainers of DPO, ORPO, KTO and reward modelling; their losses: preference_losses.py
token_losses.py cross entropy of each supervised token, for losses over whole answers
hidden_states.py what the output head takes
reference.py    what the reference gave the rows of a DPO run
means.py        what these log
evaluation_sets.py sets of held-out rows by name
best.py         the best checkpoint: that it stays, and is left; early_stopping.py: when training ends before its end
parameter_groups.py learning rates of their own: LoRA+, groups by name
samples.py      answers of the model while it trains
trackers.py     TensorBoard, W&B, trackio, MLflow
running.py      what is summed up between two logs, and the order of rows, for a run that goes on
guard.py        what each step is watched for
interrupt.py    SIGINT and SIGTERM
checkpoint.py   checkpoints that are whole or absent; finding one to resume from
run_folder.py   metrics, loss picture, adapter, model card
bench.py        how fast a model trains here and in how much memory, for each way to recompute
progress.py     what a run says while it runs
"""
