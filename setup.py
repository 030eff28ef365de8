"Packaging: everything is said in settings.ini."

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
package = settings["lib_path"]


class BuildWithNotebooks(build_py):
    "Put notebooks and cluster headers into the wheel: `ebt run`, `ebt submit` and `ebt lab` work without a checkout."

    def run(self):
        "Build the package, then copy the files."
        super().run()
        if self.editable_mode:
            return
        notebooks = Path(settings["nbs_path"])
        for folder, pattern, target in [
            (notebooks / "experiments", "*.ipynb", "experiments"),
            (notebooks, "start_here.ipynb", "notebooks"),
            (notebooks / "tutorials", "*.ipynb", "notebooks/tutorials"),
            (Path("job_scripts", "slurm_headers"), "*.slurm", "slurm_headers"),
        ]:
            target = Path(self.build_lib, package, target)
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob(pattern)):
                shutil.copyfile(file, target / file.name)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    keywords=settings["keywords"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[package, f"{package}.*"]),
    package_data={package: ["assets/**"]},
    install_requires=settings["requirements"].split(),
    extras_require={
        key.removesuffix("_requirements"): value.split()
        for key, value in settings.items()
        if key.endswith("_requirements")
    },
    entry_points={"console_scripts": settings["console_scripts"].split()},
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
