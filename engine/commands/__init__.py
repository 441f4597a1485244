"""The commands: one file each, and what they share (`common`). Nothing imports them but the two
programs, `engine.run` and `engine.cli`.
"""
