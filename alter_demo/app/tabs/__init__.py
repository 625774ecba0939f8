"""One module per tab: its `build(page, tab)` lays the tab out and connects its handlers."""
