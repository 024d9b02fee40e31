-- Functions of the schema that anybody may execute, though they are for the owner and whom they are granted
-- to: all but publish() and deliver_all(). With each whether this role may revoke that. Reads pg_proc, some
-- thousand rows.
select p.oid::regprocedure::text, pg_has_role(p.proowner, 'usage'), pg_get_userbyid(p.proowner)::text
  from pg_proc p
 where p.pronamespace = to_regnamespace('shardmq') and p.proname not in ('publish', 'deliver_all')
   and has_function_privilege('public', p.oid, 'execute')
 order by 1
