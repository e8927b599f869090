"""Executed notebooks under results/ are records, not tests."""

collect_ignore_glob = ["*"]
