"""The trainer, its callbacks and the run folder.

trainer.py      FourfoldTrainer and build_trainer: TRL's SFTTrainer with our loss, checkpoints and way out
options.py      TrainingOptions, by Hugging Face's names, and the tables of optimizers and schedules
loss.py         cross entropy over the supervised positions only
guard.py        what each step is watched for
interrupt.py    SIGINT and SIGTERM
checkpoint.py   checkpoints that are whole or absent; finding one to resume from
run_folder.py   metrics, loss picture, adapter, model card
bench.py        how fast a model trains here and in how much memory, for each way to recompute
progress.py     what a run says while it runs
"""
