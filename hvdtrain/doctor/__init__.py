"""``hvdtrain doctor``: what is installed here, whether it fits together, and what to do where it does not.

Each module looks at one thing and yields rows (`hvdtrain.doctor.rows`). Nothing that is looked at may end the doctor: native
code is loaded in other processes, with a bound, and an inspection that fails is a row itself.
"""
