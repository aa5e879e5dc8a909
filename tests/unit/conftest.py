"""`--hypothesis-profile=long`: the random state machines run for minutes instead of seconds."""

from hypothesis import settings

settings.register_profile("long", deadline=None)
