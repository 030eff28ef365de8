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


class BuildWithExperiments(build_py):
    "Put the experiment notebooks into the wheel, so that `ebt run` works without a checkout."

    def run(self):
        super().run()
        if self.editable_mode: return
        target = Path(self.build_lib, package, "experiments")
        target.mkdir(parents=True, exist_ok=True)
        for notebook in sorted(Path(settings["nbs_path"], "experiments").glob("*.ipynb")): shutil.copyfile(notebook, target / notebook.name)


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
    extras_require={key.removesuffix("_requirements"): value.split() for key, value in settings.items() if key.endswith("_requirements")},
    entry_points={"console_scripts": settings["console_scripts"].split()},
    cmdclass={"build_py": BuildWithExperiments},
    zip_safe=False,
)
