"""`python -m tpaw_ray`: the `tpaw` command where only the sources are, as in the uploaded folder of a Ray job."""

from tpaw_ray.cli import main

if __name__ == "__main__":
    main()
