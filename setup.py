"""Everything is declared in setup.cfg; this adds the start-up files that put mergekit's merge methods in place.

A `.pth` file works only at the top of site-packages, where no setuptools option puts one: `build_py` copies it there,
for a wheel and for an editable install alike.
"""

import os

from setuptools import setup
from setuptools.command.build_py import build_py

START_UP_FILES = ("fusechat_merge.pth", "fusechat_merge.start")


class BuildWithStartUpFiles(build_py):
    def run(self):
        super().run()
        destination = self.build_lib
        if self.editable_mode:
            destination = self.get_finalized_command("install").install_lib
        for name in START_UP_FILES:
            self.copy_file(name, os.path.join(destination, name), preserve_mode=False)

    def get_source_files(self):
        return [*super().get_source_files(), *START_UP_FILES]


setup(cmdclass={"build_py": BuildWithStartUpFiles})
