import pytest

from sftlab.config.configs import ExportConfig
from sftlab.export import folder


@pytest.fixture(scope="session")
def exports(tuned_run, tmp_path_factory) -> dict:
    """The tuned run's exports by their kind, merged and adapter: (folder, what export.json holds)."""
    place, made = tmp_path_factory.mktemp("exports"), {}
    for kind in ("merged", "adapter"):
        config = ExportConfig(run_dir=str(tuned_run), output_dir=str(place / kind), kind=kind)
        made[kind] = place / kind, folder.export(config)
    return made
