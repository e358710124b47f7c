"""What the tests of the report share: the script, and text that tries to be more than text."""

import functools

from tests.conftest import run_here

INSPECT = "fastchat/data/inspect_data.py"
inspect = functools.partial(run_here, INSPECT)
WINDOW = 256
HOSTILE = '</script><img src=x onerror="window.hacked=1"><!--<script>{{ 7*7 }}\'&amp;\u2028'
