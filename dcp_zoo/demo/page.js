() => {
    // Gradio's streams warn when it closes them itself.
    const warn = console.warn;
    console.warn = (...texts) => texts[0] === "Method not implemented." || warn(...texts);

    // Gradio gives all drop zones the same accessible name; this sets each one's from its label.
    const name = () => document.querySelectorAll("button[aria-dropeffect]").forEach((zone) => {
        const label = zone.closest(".block")?.querySelector("[data-testid=block-label]")?.innerText.trim();
        if (label && zone.ariaLabel !== label) zone.ariaLabel = label;
    });
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();

    // Gradio ignores dropped folders: this hands their images to the drop zone's file input, and their name to an empty
    // name field next to it.
    const images = async (entry) => {
        if (entry.isFile) {
            const file = await new Promise((done, fail) => entry.file(done, fail));
            return file.type.startsWith("image/") || /\.(heic|heif|avif)$/i.test(file.name) ? [file] : [];
        }
        const reader = entry.createReader(), found = [];
        for (;;) {  // a reader returns at most 100 entries at a time
            const entries = await new Promise((done, fail) => reader.readEntries(done, fail));
            if (!entries.length) return found;
            for (const child of entries) found.push(...await images(child));
        }
    };
    document.addEventListener("drop", async (event) => {
        const zone = event.target.closest?.("button[aria-dropeffect]"), input = zone?.querySelector("input[type=file]");
        const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
        const folder = entries.find((entry) => entry.isDirectory);
        if (!input || !folder) return;
        event.preventDefault();
        event.stopPropagation();
        const files = new DataTransfer();
        for (const entry of entries) for (const file of await images(entry)) files.items.add(file);
        input.files = files.files;
        input.dispatchEvent(new Event("change"));
        const field = zone.closest(".dcp-class")?.querySelector("input[type=text], textarea");
        if (field && !field.value) {
            field.value = folder.name.replaceAll("_", " ");
            field.dispatchEvent(new Event("input", {bubbles: true}));
        }
    }, true);
}
