"""Whether an mpirun and a library are sure to belong to different MPIs."""

from __future__ import annotations

import pytest

from hvdtrain.doctor.message_passing import _differ

OPEN_4, OPEN_5 = "mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org", "mpirun (Open MPI) 5.0.11"
HYDRA = "HYDRA build details:\n    Version:                                 4.0.2\n    Release Date: 2020"
INTEL = "Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307"


@pytest.mark.parametrize(
    ("library", "mpirun", "differ"),
    [
        ("Open MPI v5.0.11", OPEN_5, False),
        ("Open MPI v5.0.9", OPEN_5, False),  # of one series: they speak the same PMIx
        ("Open MPI v5.0.11", OPEN_4, True),
        ("Open MPI v5.0.11", HYDRA, True),
        ("MPICH Version: 4.0.2", HYDRA, False),
        ("MPICH Version: 4.0.2", OPEN_4, True),
        ("Intel(R) MPI Library 2021.9", INTEL, False),
        ("Some MPI 1.0", "another launcher 2.0", False),  # nothing is known of them: two ranks will tell
    ],
)
def test_families_and_versions(library, mpirun, differ):
    assert _differ(library, mpirun) is differ
