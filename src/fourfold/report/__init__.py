"""The page of a run: one HTML file that needs no other, from what the run's folder holds."""

from __future__ import annotations

from fourfold.report.page import render
from fourfold.report.record import Answer, Event, RunRecord, Setting, TextSample

__all__ = ["Answer", "Event", "RunRecord", "Setting", "TextSample", "render"]
