// the theme's buttons that copy code stand in landmarks, which screen readers tell apart by their names
document$.subscribe(() =>
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `Code ${i + 1}`)),
);
