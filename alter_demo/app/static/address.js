(run, tab, prompt) => {
  const url = new URL(window.location);
  for (const [key, value] of Object.entries({run, tab, prompt})) {
    if (value) url.searchParams.set(key, value); else url.searchParams.delete(key);
  }
  window.history.replaceState(null, "", url);
}
