"""What is loaded and saved: base models, documents, the embedded corpus, checkpoints.

`opened.load` is the one way to open a checkpoint or a base model; `checkpoint` says what a
checkpoint's files hold and refuses what they would not hold; `find` resolves names and paths.

This room may import `routing` and the ground floor (`settings`, `runs`, `progress`).
"""
