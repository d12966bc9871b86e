"""What setuptools writes on its way goes to a temporary folder, not into the tree.

All that is told of the package stands in pyproject.toml.
"""

import atexit
import shutil
import tempfile

from setuptools import setup

scratch = tempfile.mkdtemp(prefix="frog-triton-")
atexit.register(shutil.rmtree, scratch, ignore_errors=True)
setup(options={"build": {"build_base": scratch}, "egg_info": {"egg_base": scratch}})
