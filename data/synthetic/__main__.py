"""`python -m data.synthetic`: see `data.synthetic.corpus`."""

from data.synthetic.corpus import main

raise SystemExit(main())
