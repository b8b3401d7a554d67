document$.subscribe(() => {
  // the theme's buttons that copy code stand in landmarks, which screen readers tell apart by their names
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `Code ${i + 1}`));
  // wide tables scroll by keyboard, too, once the theme has wrapped them
  setTimeout(() =>
    document.querySelectorAll(".md-typeset__scrollwrap").forEach((wrap) => {
      if (wrap.scrollWidth > wrap.clientWidth) wrap.tabIndex = 0;
    }),
  );
});
