() => {
  const empty = () => document.querySelectorAll(".empty[aria-label]:not([role])");
  const addRoles = () => empty().forEach((node) => node.setAttribute("role", "img"));
  new MutationObserver(addRoles).observe(document.body, {childList: true, subtree: true});
  addRoles();
}
