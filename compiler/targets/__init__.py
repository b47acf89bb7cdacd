"""Targets: what legalizes and emits a program."""
