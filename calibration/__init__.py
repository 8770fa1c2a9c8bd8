"""Offline: pull refusal carriers and a gate out of a model, and write the guard artifact."""
