-- Nobody calls the functions of the schema but their owner and whom they are granted to: most of them run with
-- their owner's rights. What makes functions after this revokes them too. The outbox may be there before, whose
-- publish() and deliver_all() are for whoever may use the schema.

do $$
declare
    made regprocedure;
begin
    for made in
        select p.oid from pg_proc p
         where p.pronamespace = 'shardmq'::regnamespace and p.proname not in ('publish', 'deliver_all')
    loop
        execute format('revoke execute on function %s from public', made);
    end loop;
end $$;
