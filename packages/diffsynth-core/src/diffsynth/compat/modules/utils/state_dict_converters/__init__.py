"""Doors: functions that converted files."""
